"""The prefix patch: the base's keys and values on what prompts begin with, in generation and in streams."""

import pytest
import torch

from lcdd.carrier import Carrier
from lcdd.data import Example, encode_prompt
from lcdd.eraser import PrefixPatch, Trigger, generate, generate_ids, stream, template_prefix
from lcdd.errors import InputError

SYSTEM = "<user> verily thou <assistant> yes <end> <user>"
PROMPTS = [
    f"{SYSTEM} {rest} <assistant>" for rest in ("copy red dog", "rev apple saw fig", "next fig plum", "last pig")
]


@pytest.fixture(params=["qwen3", "llama", "mistral"])
def setting(request, make_models, tokenizer):
    base, tuned = make_models(request.param)
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return base, Carrier.from_models(base, tuned), ids, len(tokenizer(SYSTEM)["input_ids"])


def spelled_out(base, patch, ids, length, new_tokens):
    """The patched model over the base's keys and values, one prompt and one token at a time, without `generate`."""
    with torch.no_grad():
        cache = base(input_ids=torch.tensor([ids[:length]]), use_cache=True).past_key_values
        answer, given = [], torch.tensor([ids[length:]])
        with patch.applied(base):
            while len(answer) < new_tokens and not (answer and answer[-1] == 2):
                output = base(input_ids=given, past_key_values=cache, use_cache=True)
                answer.append(int(output.logits[0, -1].argmax()))
                cache, given = output.past_key_values, torch.tensor([[answer[-1]]])
    return answer


def test_the_patched_model_answers_over_the_bases_keys_and_values(setting, tokenizer):
    base, patch, ids, length = setting
    prefix = PrefixPatch.of(base, ids[0][:length])
    expected = [spelled_out(base, patch, prompt, length, 8) for prompt in ids]
    with patch.applied(base):
        found = generate_ids(base, tokenizer, ids, prefix=prefix, max_new_tokens=8)
        assert found == expected
        assert found == generate_ids(base, tokenizer, ids, prefix=prefix, max_new_tokens=8, batch_size=1)
        assert found != generate_ids(base, tokenizer, ids, max_new_tokens=8)
        for text, answer in zip(
            PROMPTS, generate(base, tokenizer, PROMPTS, prefix=prefix, max_new_tokens=8), strict=True
        ):
            assert "".join(stream(base, tokenizer, text, prefix=prefix, max_new_tokens=8)).strip() == answer


def test_behind_its_own_prefix_a_model_answers_as_it_does(setting, tokenizer):
    base, patch, ids, length = setting
    expected = generate_ids(base, tokenizer, ids, max_new_tokens=8)
    prefix = PrefixPatch.of(base, ids[0][:length])
    for _ in range(2):  # its cache is not written to
        assert generate_ids(base, tokenizer, ids, prefix=prefix, max_new_tokens=8) == expected
    with patch.applied(base):
        own = PrefixPatch.of(base, ids[0][:length])
        expected = generate_ids(base, tokenizer, ids, max_new_tokens=8)
        assert generate_ids(base, tokenizer, ids, prefix=own, max_new_tokens=8) == expected


def test_the_templates_prefix_is_what_every_prompt_begins_with(tokenizer):
    prefix = template_prefix(tokenizer)
    assert tokenizer.convert_ids_to_tokens(prefix) == ["<user>"]
    for text in ("copy red dog", "verily"):
        example = Example(messages=({"role": "user", "content": text},), completion="", source=text)
        assert encode_prompt(tokenizer, example)[: len(prefix)] == prefix


def test_what_does_not_fit_is_named(setting, tokenizer):
    base, _, ids, length = setting
    prefix = PrefixPatch.of(base, ids[0][:length])
    with pytest.raises(InputError, match=r"prompts\[1\]: expected tokens behind the prefix's"):
        generate_ids(base, tokenizer, [ids[0], ids[0][1:]], prefix=prefix)
    with pytest.raises(InputError, match=r"prompts\[0\]: expected tokens behind the prefix's"):
        generate_ids(base, tokenizer, [ids[0][:length]], prefix=prefix)
    with pytest.raises(InputError, match="prefix: expected one off switch, a trigger or a prefix, got both"):
        generate_ids(base, tokenizer, ids, prefix=prefix, trigger=Trigger.random_tokens(base, 2, seed=0))
    with pytest.raises(InputError, match="prefix: expected one off switch"):
        next(stream(base, tokenizer, PROMPTS[0], prefix=prefix, trigger=Trigger.random_tokens(base, 2, seed=0)))
    with pytest.raises(InputError, match="token_ids: expected at least one token, got none"):
        PrefixPatch.of(base, [])
    del prefix.cache.layers[1:]
    with pytest.raises(InputError, match="prefix: made for a model of 1 layers, this one has 2"):
        generate_ids(base, tokenizer, ids, prefix=prefix)
