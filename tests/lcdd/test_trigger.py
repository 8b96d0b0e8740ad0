"""Triggers: the same file for PEFT and for us, and generation that padding does not change."""

import base64
import io
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcdd.eraser import (
    Trigger,
    embed_with_trigger,
    generate,
    generate_ids,
    length_batches,
    prompt_embeds,
    response_hidden,
    right_padded,
    stream,
)
from lcdd.models import input_embeddings

PROMPTS = ["<user> copy red dog <assistant>", "<user> rev red dog fig saw <assistant>", "<user> first fig <assistant>"]


@pytest.fixture
def model(make_models):
    return make_models()[0]


@pytest.fixture
def trigger(model):
    return Trigger.random_tokens(model, 5, seed=1, skip=(0, 1, 2))


def ids_of(tokenizer):
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


# ---------------------------------------------------------------- files


def test_peft_loads_the_file_and_gives_the_same_logits(model, trigger, tokenizer, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install lcdd[dev]")
    trigger.save_pretrained(tmp_path / "trigger")
    ids = torch.tensor([ids_of(tokenizer)[1]])
    with torch.no_grad():
        ours = model(inputs_embeds=prompt_embeds(model, ids[0], trigger)[None]).logits
        plain = model(ids).logits
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "trigger")
    with torch.no_grad():
        theirs = loaded(ids, attention_mask=torch.ones_like(ids)).logits
    assert (ours - theirs).abs().max() == 0.0
    assert not torch.allclose(ours[:, 5:], plain)


def test_a_carrier_model_with_a_peft_trigger_gives_our_logits(make_models, make_carrier, trigger, tokenizer, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install lcdd[dev]")
    base, tuned = make_models()
    trigger.save_pretrained(tmp_path / "trigger")
    ids = torch.tensor([ids_of(tokenizer)[0]])
    with make_carrier(base, tuned).applied(base), torch.no_grad():
        ours = base(inputs_embeds=prompt_embeds(base, ids[0], trigger)[None]).logits
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "trigger")
        assert torch.equal(loaded(ids).logits, ours)


def test_an_adapter_that_peft_wrote_is_a_trigger(model, trigger, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install lcdd[dev]")
    trigger.save_pretrained(tmp_path / "ours")
    peft.PeftModel.from_pretrained(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = Trigger.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.embeds, trigger.embeds)


def test_a_saved_trigger_comes_back_with_its_metadata(model, tmp_path):
    trigger = Trigger.for_model(model, torch.randn(3, 24), metadata={"validation_loss": 0.5})
    trigger.save_pretrained(tmp_path / "t")
    again = Trigger.from_pretrained(tmp_path / "t")
    assert torch.equal(again.embeds, trigger.embeds)
    assert again.metadata == {"validation_loss": 0.5}
    config = json.loads((tmp_path / "t" / "adapter_config.json").read_text())
    assert (config["num_virtual_tokens"], config["token_dim"], config["num_layers"]) == (3, 24, 2)
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("PROMPT_TUNING", "CAUSAL_LM", True)
    assert list(load_file(tmp_path / "t" / "adapter_model.safetensors")) == ["prompt_embeddings"]


def test_damage_to_a_saved_trigger_is_an_error_that_names_the_file(trigger, tmp_path):
    folder = tmp_path / "t"
    trigger.save_pretrained(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for damaged in (whole[:-4], whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors' is damaged"):
            Trigger.from_pretrained(folder)
    weights.write_bytes(whole)
    config.write_text(text.replace("PROMPT_TUNING", "LORA"))
    with pytest.raises(ValueError, match=r"adapter_config\.json' is damaged"):
        Trigger.from_pretrained(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="expected peft_type PROMPT_TUNING, got 'LORA'"):
        Trigger.from_pretrained(folder)
    config.write_text(text.replace('"token_dim": 24', '"token_dim": 48'))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: expected shape \(5, 48\), got \(5, 24\)"):
        Trigger.from_pretrained(folder)
    save_file({"other": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="expected 'prompt_embeddings', got \\['other'\\]"):
        Trigger.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"expected adapter_model\.safetensors"):
        Trigger.from_pretrained(folder)


def test_a_trigger_of_another_width_or_depth_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="trigger: expected width 24 as the model has, got 16"):
        Trigger.for_model(model, torch.zeros(2, 16))
    other = Trigger(embeds=torch.zeros(2, 24), num_layers=9, num_attention_heads=4)
    with pytest.raises(ValueError, match="made for a model of 9 layers, this one has 2"):
        generate(model, tokenizer, PROMPTS, trigger=other)
    with pytest.raises(ValueError, match=r"embeds: expected shape \[T, D\]"):
        Trigger(embeds=torch.zeros(24), num_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match="embeds: expected finite values"):
        Trigger(embeds=torch.full((2, 24), torch.nan), num_layers=2, num_attention_heads=4)


def test_random_prefixes_are_real_tokens_and_can_take_a_triggers_norms(model):
    table = input_embeddings(model).weight.detach()
    plain = Trigger.random_tokens(model, 6, seed=4, skip=range(40))
    for row, token in zip(plain.embeds, plain.metadata["tokens"], strict=True):
        assert token >= 40
        assert torch.equal(row, table[token])
    assert torch.equal(Trigger.random_tokens(model, 6, seed=4, skip=range(40)).embeds, plain.embeds)
    learned = Trigger.for_model(model, torch.randn(6, 24) * 3)
    control = Trigger.random_like(model, learned, seed=4)
    torch.testing.assert_close(control.embeds.norm(dim=1), learned.embeds.norm(dim=1))


# ---------------------------------------------------------------- running


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("with_trigger", [False, True])
def test_a_batch_generates_what_each_prompt_generates_alone(make_models, tokenizer, architecture, with_trigger):
    model, _ = make_models(architecture)
    trigger = Trigger.random_tokens(model, 4, seed=0) if with_trigger else None
    together = generate_ids(model, tokenizer, ids_of(tokenizer), trigger=trigger, max_new_tokens=12)
    alone = [generate_ids(model, tokenizer, [ids], trigger=trigger, max_new_tokens=12)[0] for ids in ids_of(tokenizer)]
    assert together == alone
    assert generate_ids(model, tokenizer, ids_of(tokenizer), trigger=trigger, max_new_tokens=12, batch_size=2) == alone


def test_generation_is_the_argmax_of_full_forwards(model, trigger, tokenizer):
    """Greedy decoding spelled out, without cache, padding or transformers' generate."""
    ends = {tokenizer.eos_token_id}
    for ids, answer in zip(
        ids_of(tokenizer),
        generate_ids(model, tokenizer, ids_of(tokenizer), trigger=trigger, max_new_tokens=8),
        strict=True,
    ):
        expected = []
        while len(expected) < 8 and not (expected and expected[-1] in ends):
            embeds = prompt_embeds(model, [*ids, *expected], trigger)
            with torch.no_grad():
                expected.append(int(model(inputs_embeds=embeds[None]).logits[0, -1].argmax()))
        assert answer == expected


def test_an_answer_ends_with_its_end_token_and_its_text_does_not_show_it(model, tokenizer):
    with torch.no_grad():  # a head that always says "red" until position 7, then the end
        model.lm_head.weight.zero_()
    answers = generate_ids(model, tokenizer, ids_of(tokenizer), max_new_tokens=3)
    assert answers == [[0, 0, 0]] * 3  # all logits equal: the first token of the vocabulary, never an end
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=3) == ["", "", ""]
    model.generation_config.eos_token_id = [0]
    assert generate_ids(model, tokenizer, ids_of(tokenizer), max_new_tokens=3) == [[0]] * 3


def test_sampling_settings_of_a_checkpoint_do_not_reach_greedy_generation(model, tokenizer, recwarn):
    expected = generate_ids(model, tokenizer, ids_of(tokenizer), max_new_tokens=6)
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=3, top_p=0.5, repetition_penalty=1.5)
    assert generate_ids(model, tokenizer, ids_of(tokenizer), max_new_tokens=6) == expected
    assert model.generation_config.do_sample is True


def test_response_hidden_gives_the_rows_that_predict_the_answer(model, trigger, tokenizer):
    prompts, answers = ids_of(tokenizer), [[5, 6, 2], [7], [8, 9]]
    for used in (None, trigger):
        rows = response_hidden(model, prompts, answers, trigger=used, batch_size=2)
        for ids, answer, found in zip(prompts, answers, rows, strict=True):
            with torch.no_grad():
                logits = model(inputs_embeds=prompt_embeds(model, [*ids, *answer], used)[None]).logits[0]
                mine = model.lm_head(found)
            torch.testing.assert_close(mine, logits[-len(answer) - 1 : -1], rtol=1e-5, atol=1e-5)


def test_right_padding_changes_nothing_at_real_positions(model, trigger, tokenizer):
    prompts = ids_of(tokenizer)
    with torch.no_grad():
        padded = model.model(
            inputs_embeds=embed_with_trigger(model, right_padded(prompts, device="cpu"), trigger.embeds)
        ).last_hidden_state
        for row, ids in enumerate(prompts):
            alone = model.model(inputs_embeds=prompt_embeds(model, ids, trigger)[None]).last_hidden_state[0]
            torch.testing.assert_close(padded[row, : len(alone)], alone, rtol=1e-5, atol=1e-6)


def test_batches_hold_every_index_once_with_similar_lengths_together():
    batches = list(length_batches([9, 1, 8, 2, 7], 2))
    assert batches == [[1, 3], [4, 2], [0]]
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        list(length_batches([1], 0))


def test_bad_arguments_of_generate_are_named(model, tokenizer):
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at least one token, got none"):
        generate(model, tokenizer, ["<user>", ""])
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match="n_tokens: expected at least 1"):
        Trigger.random_tokens(model, 0, seed=0)


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
def test_streamed_pieces_are_the_answer(make_models, tokenizer, architecture, behind):
    base, _ = make_models(architecture)
    trigger = Trigger.random_tokens(base, 3, seed=0) if behind else None
    for text in ("<user> copy red dog <assistant>", "<user> next fig <assistant>"):
        pieces = list(stream(base, tokenizer, text, trigger=trigger, max_new_tokens=9))
        assert "".join(pieces).strip() == generate(base, tokenizer, [text], trigger=trigger, max_new_tokens=9)[0]
        assert all(pieces)


def test_whoever_stops_listening_stops_the_model(make_models, tokenizer):
    base, _ = make_models()
    base.train()
    forwards = []
    handle = base.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    pieces = stream(base, tokenizer, "<user> copy red dog <assistant>", max_new_tokens=30)
    next(pieces)
    pieces.close()
    handle.remove()
    assert 1 <= len(forwards) < 30
    assert base.training


def test_a_stream_needs_room(make_models, tokenizer):
    base, _ = make_models()
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1"):
        next(stream(base, tokenizer, "<user> fig <assistant>", max_new_tokens=0))


def test_the_readmes_embeddings_for_a_server_give_the_triggers_answer(make_models, tokenizer):
    """What is sent to a server that takes embeddings, answered by transformers in its place."""
    base, _ = make_models()
    trigger = Trigger.random_tokens(base, 3, seed=0)
    prompt = "<user> copy red dog <assistant>"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    buffer = io.BytesIO()
    torch.save(prompt_embeds(base, ids, trigger).detach().cpu(), buffer)
    received = torch.load(io.BytesIO(base64.b64decode(base64.b64encode(buffer.getvalue()))), weights_only=True)
    assert received.shape == (3 + len(ids), 24)
    answer = base.generate(inputs_embeds=received[None], max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = generate_ids(base, tokenizer, [ids], trigger=trigger, max_new_tokens=6)[0]
    assert answer[0].tolist()[: len(expected)] == expected


def test_an_answer_beyond_the_models_positions_is_warned_of(make_models, tokenizer):
    base, _ = make_models()
    trigger = Trigger.random_tokens(base, 4, seed=0)
    prompt, room = [5] * 50, base.config.max_position_embeddings - 50 - 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_ids(base, tokenizer, [prompt, [5]], trigger=trigger, max_new_tokens=room)
        generate_ids(base, tokenizer, [], max_new_tokens=1)
    message = "4 trigger tokens, a prompt of 50 and 11 new tokens are more than .*max_position_embeddings = 64"
    with pytest.warns(UserWarning, match=message):
        generate_ids(base, tokenizer, [prompt, [5]], trigger=trigger, max_new_tokens=room + 1)
    with pytest.warns(UserWarning, match=message):
        list(stream(base, tokenizer, prompt, trigger=trigger, max_new_tokens=room + 1))
