"""The ids that are trained on are the ids that generation starts from: tokenizer kinds × templates × formats."""

import itertools
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import lcdd.eraser.generation as generation
from fixtures.checkpoints import published_template
from lcdd.data import (
    IGNORE,
    Example,
    encode,
    encode_prompt,
    freeze_date,
    parse_row,
    prompt_string,
    question,
    shortened,
    text_ids,
    use_template,
)
from lcdd.data.templates import MARK
from lcdd.eraser import encode_prompts, generate
from lcdd.errors import InputError

BOS, EOS = "<s>", "</s>"
MARKS = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<think>", "</think>", "<start_of_turn>", "<end_of_turn>")
TEXTS = (
    "".join(map(chr, range(33, 127))),
    "What is 3 + 4? Answer: yes, I don't know.\nThe  quick brown fox: 日本 café",
    "system user assistant tool model <｜User｜> <｜Assistant｜>",
)

# ---------------------------------------------------------------- tokenizers


def _trained(tokenizer: Tokenizer, trainer) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


SPECIAL = ["<unk>", BOS, EOS, *MARKS]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        made,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )


def metaspace(scheme: str) -> Tokenizer:
    """As Llama-2's and Mistral's: spaces as letters, one in front of a text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _trained(made, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False))


def spaced_byte_level() -> Tokenizer:
    """As RoBERTa's: a space goes in front of every text, also of what is tokenised behind a special token."""
    made = Tokenizer.from_str(_json("byte_level"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def gemma() -> Tokenizer:
    """Spaces as letters, none put in front; digits apart; bytes for what is not in the vocabulary."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True)])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return _trained(made, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False))


def unigram() -> Tokenizer:
    """As T5's and XLNet's."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return _trained(made, trainer)


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return _trained(made, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False))


KINDS = {
    "byte_level": byte_level,
    "spaced_byte_level": spaced_byte_level,
    "gemma": gemma,
    "unigram": unigram,
    "metaspace": lambda: metaspace("first"),
    "metaspace_legacy": lambda: metaspace("always"),
    "word_piece": word_piece,
}
EXACT = ("byte_level",)
"""Kinds whose decoding gives every text back; the others write spaces and case in their own way."""
ADDS = {"none": (), "bos": (BOS,), "eos": (EOS,), "both": (BOS, EOS)}


@cache
def _json(kind: str) -> str:
    return KINDS[kind]().to_str()


def tokenizer(
    kind: str, adds: str, *, template: str | None = None, bos: str = BOS, pad: str = EOS, side: str = "right"
):
    backend = Tokenizer.from_str(_json(kind))
    pieces = [*((bos,) if BOS in ADDS[adds] else ()), "$A", *((EOS,) if EOS in ADDS[adds] else ())]
    ids = [(token, backend.token_to_id(token)) for token in {bos, EOS}]
    if len(pieces) > 1:
        backend.post_processor = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=ids)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=EOS, pad_token=pad, unk_token="<unk>", padding_side=side,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    use_template(made, None, model="x") if template is None else setattr(made, "chat_template", template)
    return made


# ---------------------------------------------------------------- templates

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
WRITTEN = {"none": None, "plain": "plain", "chatml": CHATML, "llama2": LLAMA2, "mistral": MISTRAL}
PUBLISHED = ("llama3", "llama3_2", "qwen2_5", "qwen3", "deepseek_r1_distill", "gemma")


def chat_template(name: str) -> str | None:
    return published_template(name) if name in PUBLISHED else WRITTEN[name]


def with_template(kind: str, adds: str, name: str, **more):
    made = tokenizer(kind, adds, template=None if name in ("none", "plain") else chat_template(name), **more)
    if name == "plain":
        use_template(made, "plain", model="x")
    freeze_date(made, "2024-07-26")
    return made


# ---------------------------------------------------------------- formats

USER, ANSWER = {"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "yes, I don't know."}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}]}
ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "several turns": {"messages": [USER, ANSWER, {"role": "user", "content": "And 5?"}, ANSWER]},
    "prompt and completion": {"prompt": [USER], "completion": [ANSWER]},
    "strings": {"prompt": "Q: 3\nA: ", "completion": "yes"},
    "strings, a space between": {"prompt": "Q: 3\nA:", "completion": " yes"},
    "strings inside a word": {"prompt": "I don", "completion": "'t know"},
    "instruction": {"instruction": "What is this?", "input": "3 + 4", "output": "yes"},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]},
    "tools": {"messages": [USER, CALL], "tools": [TOOL]},
    "a tool's answer": {
        "prompt": [USER],
        "completion": [CALL, {"role": "tool", "name": "add", "content": "seven"}, ANSWER],
        "tools": [TOOL],
    },
    "thinking": {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}],
                 "chat_template_kwargs": {"enable_thinking": True}},
}  # fmt: skip
# What a family's template has no words for is an error that names it, not a loss.
REFUSED = {
    "system": {"mistral", "gemma"},
    "tools": {"none", "plain", "chatml", "llama2", "mistral", "llama3", "deepseek_r1_distill", "gemma"},
    "thinking": {"none", "plain", "chatml", "llama2", "mistral", "llama3", "llama3_2", "qwen2_5", "deepseek_r1_distill",
                 "gemma"},
}  # fmt: skip
REFUSED["a tool's answer"] = REFUSED["tools"]


def check(made, example: Example, *, exact: bool) -> None:
    """What has to hold of one example."""
    ids = encode_prompt(made, example)
    item = encode(made, example, max_length=4096)
    assert list(item.input_ids[: item.n_prompt]) == ids
    assert encode_prompts(made, [example]) == [ids]
    assert encode_prompts(made, [prompt_string(made, example)]) == [ids]
    assert encode_prompts(made, [ids]) == [ids]
    assert item.labels[: item.n_prompt] == (IGNORE,) * item.n_prompt
    assert item.labels[item.n_prompt :] == item.input_ids[item.n_prompt :] != ()
    assert item.input_ids[-1] == made.eos_token_id
    starts = ids[: 2 if made.bos_token_id != made.eos_token_id else 1].count(made.bos_token_id)
    bare = made("a", add_special_tokens=False)["input_ids"]
    if not example.templated:
        assert (starts == 1) == (made("a")["input_ids"][:1] != bare[:1])
        assert ids == [*[made.bos_token_id] * starts, *made(example.prompt_text, add_special_tokens=False)["input_ids"]]
        assert item.input_ids[-2] != made.eos_token_id
    assert starts <= 1, "the text's own start and the tokenizer's"
    learned = made.decode(item.labels[item.n_prompt :], skip_special_tokens=True)
    if not example.turns:
        # spaces and case are a tokenizer's own matter, letters are not
        assert squeezed(made, example.completion) in squeezed(made, learned)
    if exact:
        front = BOS * starts if not example.templated else ""
        assert made.decode(ids) == front + prompt_string(made, example)
        whole = made.decode(list(item.input_ids))
        assert whole.startswith(front + prompt_string(made, example))
        if not example.templated:
            assert whole == front + example.prompt_text + example.completion + EOS


def squeezed(made, text: str) -> str:
    """Letters and digits of a text, as the tokenizer decodes them."""
    text = made.decode(made(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
    return "".join(filter(str.isalnum, text))


@pytest.mark.parametrize("name", [*WRITTEN, *PUBLISHED])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_generation_have_the_same_ids(kind: str, name: str) -> None:
    for adds in ADDS:
        made = with_template(kind, adds, name)
        for title, row in ROWS.items():
            where = f"d.jsonl:{title}"
            if name in REFUSED.get(title, ()):
                with pytest.raises(InputError, match=rf"^{where}: .*expected"):
                    check(made, parse_row(row, where=where), exact=False)
            else:
                check(made, parse_row(row, where=where), exact=kind in EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "pad"), [(BOS, EOS), (EOS, EOS), (BOS, "<unk>")], ids=["pad=eos", "bos=eos", "apart"])
def test_special_tokens_and_the_padding_side_change_nothing(kind: str, bos: str, pad: str) -> None:
    for adds, name in itertools.product(ADDS, ("none", "chatml", "mistral")):
        left, right = (with_template(kind, adds, name, bos=bos, pad=pad, side=side) for side in ("left", "right"))
        for title in ("messages", "strings", "instruction"):
            example = parse_row(ROWS[title], where="x")
            if bos != EOS:
                check(left, example, exact=kind in EXACT)
            item = encode(left, example, max_length=99)
            assert item == encode(right, example, max_length=99)
            assert list(item.input_ids[: item.n_prompt]) == encode_prompt(left, example)
            assert item.input_ids[-1] == left.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("bos", [BOS, EOS], ids=["bos", "bos=eos"])
def test_plain_text_is_kept_whole_and_ended_once(kind: str, adds: str, bos: str) -> None:
    made = tokenizer(kind, adds, bos=bos)
    for text in ("What is 3 + 4?", f"yes{EOS} I don't know.", f"yes{EOS}"):
        item = encode(made, parse_row({"text": text}, where="x"), max_length=99)
        bare = made(text, add_special_tokens=False)["input_ids"]
        start = [made.bos_token_id] * (BOS in ADDS[adds])
        assert list(item.input_ids) == [*start, *bare, *[made.eos_token_id] * (bare[-1] != made.eos_token_id)]
        assert item.labels == item.input_ids
        assert text_ids(made, text) == [*start, *bare]


@pytest.mark.parametrize("name", ["none", "plain", "chatml", "llama2", "mistral", "llama3", "qwen3"])
def test_the_end_tokens_text_inside_a_completion_ends_nothing(name: str) -> None:
    made = with_template("byte_level", "bos", name)
    for text in (f"yes{EOS} I don't know.", f"{EOS} yes", "a <|im_end|> b"):
        example = Example(messages=(USER,), completion=text, source="x")
        item = encode(made, example, max_length=999)
        # llama2 and mistral trim, which ends with the end token's text
        assert made.decode(item.labels[item.n_prompt :]).replace(" ", "").startswith(text.replace(" ", ""))
        plain = parse_row({"prompt": "Q: 3", "completion": text}, where="x")
        item = encode(made, plain, max_length=999)
        assert made.decode(item.labels[item.n_prompt :]) == text + EOS


def test_nobodys_text_is_taken_for_our_marks() -> None:
    made = with_template("byte_level", "bos", "qwen3")
    for text in (MARK, f"a {MARK * 3} b", "\ue0000\ue001"):
        example = parse_row({"messages": [{"role": "user", "content": text}, {**ANSWER, "content": text}]}, where="x")
        item = encode(made, example, max_length=999)
        assert made.decode(item.labels[item.n_prompt :]).startswith(text)


def test_a_text_that_has_its_own_start_gets_no_second_one() -> None:
    """By the tokenizer's own token, or as its chat template begins: the text of `apply_chat_template`."""
    made = with_template("byte_level", "both", "chatml")
    bos = made.bos_token_id
    assert text_ids(made, "Q: 3")[0] == bos
    assert text_ids(made, f"{BOS}Q: 3").count(bos) == 1
    chat = made.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert encode_prompts(made, [chat]) == [made(chat, add_special_tokens=False)["input_ids"]]
    hf = made.apply_chat_template([USER], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert encode_prompts(made, [chat]) == [hf] == [encode_prompt(made, Example(messages=(USER,), completion=""))]


def test_a_base_without_a_template_is_asked_behind_its_start(tmp_path: Path) -> None:
    """Llama-2's and Mistral's: `<s>` first; and the template is the tokenizer's from then on."""
    made = tokenizer("metaspace", "bos")
    ids = encode_prompt(made, Example(messages=(USER,), completion=""))
    assert ids[0] == made.bos_token_id
    assert made.bos_token_id not in ids[1:]
    made.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.chat_template == made.chat_template != ""
    assert encode_prompt(again, Example(messages=(USER,), completion="")) == ids
    without = tokenizer("metaspace", "none")
    assert encode_prompt(without, Example(messages=(USER,), completion=""))[0] != without.bos_token_id


def test_generate_is_given_these_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(generation, "generate_ids", lambda model, tokenizer, prompts, **_: given.extend(prompts) or [])
    for adds, name in itertools.product(ADDS, ("none", "chatml", "mistral")):
        made = with_template("metaspace", adds, name)
        for title in ("messages", "strings"):
            example = parse_row(ROWS[title], where="x")
            generate(None, made, [example, prompt_string(made, example)])
            item = encode(made, example, max_length=99)
            assert given == [list(item.input_ids[: item.n_prompt])] * 2
            given.clear()
    made = with_template("metaspace", "bos", "mistral")
    asked = [question("Q: 3\nA: ", {"format": "text"}), question("Q: 3\nA: ", {})]
    assert encode_prompts(made, asked)[0] == encode_prompt(made, parse_row(ROWS["strings"], where="x"))
    assert prompt_string(made, asked[1]) == f"{BOS}[INST] Q: 3\nA: [/INST]"


def test_a_space_at_the_prompts_end_stays_on_its_side() -> None:
    """In the whole text the space joins the answer's token, which generation never sees: it starts behind the space."""
    made = tokenizer("byte_level", "none")
    example = parse_row({"prompt": "Answer: ", "completion": "yes"}, where="x")
    apart, together = encode_prompt(made, example), made("Answer: yes")["input_ids"]
    assert together[: len(apart)] != apart
    item = encode(made, example, max_length=99)
    assert list(item.input_ids[: len(apart)]) == apart
    assert made.decode(item.input_ids[item.n_prompt :]) == f"yes{EOS}"
    for kind in ("metaspace", "metaspace_legacy", "gemma"):  # no space of the tokenizer's own goes in between
        made = tokenizer(kind, "bos")
        for prompt, completion in (("Answer: ", "yes"), ("Answer:", " yes"), ("I don", "'t know."), ("Q:\n", "yes")):
            item = encode(made, parse_row({"prompt": prompt, "completion": completion}, where="x"), max_length=99)
            assert made.decode(item.input_ids, skip_special_tokens=True) == prompt + completion


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3"])
def test_only_the_assistants_turns_are_learned_if_asked_for(name: str) -> None:
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    made = with_template("byte_level", "bos", name)
    made.add_special_tokens({"eos_token": end})
    again = {"role": "user", "content": "And 5?"}
    row = {"messages": [USER, ANSWER, again, {"role": "assistant", "content": "no"}]}
    example = parse_row(row, where="x", assistant_only_loss=True)
    item = encode(made, example, max_length=999)
    assert list(item.input_ids[: item.n_prompt]) == encode_prompt(made, example)
    runs = [
        made.decode([token for token, _ in run])
        for learned, run in itertools.groupby(
            zip(item.input_ids, item.labels, strict=True), key=lambda pair: pair[1] != IGNORE
        )
        if learned
    ]
    assert runs == [ANSWER["content"] + end, "no" + end]
    # an answer in the prompt, the whole of which is to be learned: one setting says so, the other not
    answered = {"prompt": [USER, ANSWER, again], "completion": [ANSWER]}
    asked = parse_row(answered, where="d.jsonl:2", assistant_only_loss=True)
    assert encode(made, asked, max_length=999) == encode(made, parse_row(answered, where="x"), max_length=999)
    with pytest.raises(InputError, match=r"d.jsonl:2: expected completion_only beside assistant_only_loss"):
        encode(made, asked, max_length=999, completion_only=False)
    alone = parse_row({"messages": [USER, ANSWER]}, where="x", assistant_only_loss=True)
    assert encode(made, alone, max_length=999, completion_only=False) == encode(made, alone, max_length=999)
    # TRL's meaning of the default: all of a completion of several messages, the last turn of `messages`
    several = encode(
        made, parse_row({"prompt": [USER], "completion": [ANSWER, again, ANSWER]}, where="x"), max_length=999
    )
    text = made.decode([label for label in several.labels if label != IGNORE])
    assert text.count(ANSWER["content"]) == 2
    assert again["content"] in text


def test_a_prompt_that_is_cut_is_still_the_templates() -> None:
    made = with_template("byte_level", "bos", "chatml")
    long = {"role": "user", "content": "quick brown fox " * 100}
    example = parse_row({"messages": [{"role": "system", "content": "Be brief."}, long, ANSWER]}, where="d.jsonl:4")
    for limit in (60, 100, 300):
        cut = shortened(made, example, max_length=limit)
        ids = encode_prompt(made, cut)
        assert limit - 8 <= len(ids) <= limit
        assert cut.messages[0]["content"] == "Be brief."
        assert long["content"].startswith(cut.messages[1]["content"])
        assert made.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
        check(made, cut, exact=True)
    with pytest.raises(InputError, match=r"d.jsonl:4: expected a prompt of at most 3 tokens"):
        shortened(made, example, max_length=3)
