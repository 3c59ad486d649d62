"""Hugging Face folders: tiny models made here, texts and images; and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import perturbkit.audit as audit
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent.parent))
import _subjects

GOOD, BAD, FILL = ("good", "great", "fine"), ("bad", "awful", "poor"), ("the", "film", "was", "so", "plot")
TEXTS = [
    " ".join([FILL[i % 5], FILL[(i + 1) % 5], (GOOD if i % 2 else BAD)[i % 3], FILL[(i * 3) % 5]]) for i in range(24)
]  # fmt: skip
LABELS = [i % 2 for i in range(24)]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A BERT of one layer whose answer is the sum of word scores held in its embeddings."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    here = tmp_path_factory.mktemp("hf")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILL, "##ly"]
    (here / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(str(here / "vocab.txt"))
    names = {0: "negative", 1: "positive"}
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=2, id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            model(**encoded, labels=torch.tensor(LABELS)).loss.backward()
            optimizer.step()
    model.eval().save_pretrained(here / "model")
    tokenizer.save_pretrained(here / "model")
    return here / "model"


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification

    here = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        id2label={0: "left", 1: "right"}, label2id={"left": 0, "right": 1},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config).eval()
    model.save_pretrained(here / "model")
    processor = {
        "do_resize": True, "size": {"height": 8, "width": 8}, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2], "resample": 2,
    }  # fmt: skip
    (here / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    return here / "model", model


def test_texts_are_answered_as_the_model_answers_them(text_folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = audit.open_subject(str(text_folder), (TEXTS, LABELS))
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    model = AutoModelForSequenceClassification.from_pretrained(text_folder).eval()
    with torch.no_grad():
        expected = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found.scores(), expected, rtol=1e-4, atol=1e-5)
    assert found.classes == ("negative", "positive")
    assert found.has_gradient()
    # Longer than the table of positions: cut, not refused.
    assert found.predict_texts(["good film " * 50]).shape == (1, 2)


@pytest.mark.parametrize("labels", [["negative", "positive"], ["Negative", "POSITIVE"], [0, 1]])
def test_labels_by_name_in_any_case_or_by_number(text_folder, labels):
    found = audit.open_subject(str(text_folder), (TEXTS, [labels[i] for i in LABELS]))
    assert found.y.tolist() == LABELS
    assert found.notes == []


def test_names_that_do_not_match_are_noted(text_folder):
    found = audit.open_subject(str(text_folder), (TEXTS, [["neg", "pos"][i] for i in LABELS]))
    assert "are not the names of the model's outputs (negative, positive)" in found.notes[0]


def test_pieces_of_words_are_matched_with_their_words(text_folder):
    from perturbkit.audit.attributions import _owners

    model = audit.open_subject(str(text_folder), (TEXTS, LABELS)).text_model
    ids, _ = model.tokenize(["Good badly film"])
    assert _owners(["Good", "badly", "film"], model.decode(ids[0])) == [None, 0, 1, 1, 2, None]


def test_a_tokenizer_that_does_not_know_the_texts_is_told(text_folder):
    strange = [f"{text} zzz qqq xxx" for text in TEXTS]
    long = [" ".join([GOOD[i % 3]] * (3 if i else 30)) for i in range(24)]
    told = {}
    for name, texts in (("known", TEXTS), ("strange", strange), ("long", long)):
        finding = audit.run(str(text_folder), (texts, LABELS), only=["sanity"], progress=False)["sanity"]
        told[name] = {row[0]: row[1:] for row in finding.table.rows}, finding.headline
    known, strange_told, long_told = (told[k][0] for k in ("known", "strange", "long"))
    assert known["words known to the tokenizer"] == ("0% of the tokens are unknown", "passed")
    assert known["texts read to their end"] == ("yes", "passed")
    # Of nine tokens (four words, three strange ones and two that frame a text) three.
    assert strange_told["words known to the tokenizer"] == ("33% of the tokens are unknown", "look")
    assert "33% of the tokens are unknown" in told["strange"][1]
    assert long_told["texts read to their end"] == (
        "1 of 24 texts fill all 16 tokens that are read; what follows is cut off", "noted",
    )  # fmt: skip


def test_maps_of_texts_of_many_lengths_are_those_of_each(text_folder):
    texts = [text + " film" * (i % 3) for i, text in enumerate(TEXTS)]
    whole = audit.run(str(text_folder), (texts, LABELS), only=["explain"], n=8, progress=False)[
        "explain"
    ].series
    rows = [int(title.split("row ")[1].rstrip(")")) for title in whole["titles"]]
    assert len({len(texts[row]) for row in rows}) > 1
    for i, row in enumerate(rows):
        again = audit.run(
            str(text_folder),
            (texts[row : row + 1] * 2, LABELS[row : row + 1] * 2),
            only=["explain"],
            progress=False,
        )
        for method, maps in again["explain"].series["maps"].items():
            if method != "random":
                a, b = torch.tensor(maps[0]), torch.tensor(whole["maps"][method][i])
                assert torch.allclose(a, b[: len(a)], atol=1e-6), method


def test_embeddings_carry_the_gradient(text_folder):
    report = audit.run(
        str(text_folder), (TEXTS, LABELS), only=["sanity", "explain", "certify"], n=8, progress=False
    )
    assert "integrated gradients" in report["explain"].series["maps"]
    assert report["explain"].cost.ngrad > 0
    maps = torch.tensor(report["explain"].series["maps"]["integrated gradients"])
    assert bool(maps.isfinite().all())
    assert bool((maps != 0).any(1).all())
    assert "Left out" not in report["explain"].does_not_show
    assert report["certify"].status in ("ok", "weak")


def test_images_are_resized_and_normalised_inside(image_folder):
    folder, model = image_folder
    x, y = _subjects.images(6)
    found = audit.open_subject(str(folder), (x, y))
    small = torch.nn.functional.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]))
    with torch.no_grad():
        expected = model((small - mean) / std).logits
    torch.testing.assert_close(found.scores(), expected, rtol=1e-4, atol=1e-5)
    assert found.classes == ("left", "right")
    assert found.bounds == (0.0, 1.0)
    assert found.has_gradient()
    assert any("8x8" in r for r in found.remarks)


def refused(folder, match, data=None):
    with pytest.raises(checks.ModelError, match=match) as caught:
        audit.open_subject(str(folder), data if data is not None else (TEXTS, LABELS))
    assert "allowed" in str(caught.value)


@pytest.fixture
def copy(text_folder, tmp_path):
    return Path(shutil.copytree(text_folder, tmp_path / "copy"))


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin, a pickle.*safe_serialization")


def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, "no weights")


def test_code_of_its_own_is_never_run(copy):
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    refused(copy, "code of its own.*evil.Evil.*never run")


def test_a_head_that_would_be_random(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("classifier")}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, "lack classifier.*would be random.*Fine-tune")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["BertModel"]}, "holds a BertModel.*ForSequenceClassification"),
        ({"architectures": None}, "no stated architecture"),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
    ],
    ids=["base", "none", "multi-label"],
)
def test_models_that_do_something_else(copy, change, match):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    refused(copy, match)


def test_broken_folders(copy, tmp_path, text_folder):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "without config.json")
    refused(text_folder, "reads texts, but arrays holds a table", _subjects.table(6))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    config = json.loads((copy / "config.json").read_text())
    for change, match in (
        ({"architectures": 5}, "holds a 5"),
        ({"auto_map": "evil.Evil"}, "code of its own .evil.Evil"),
    ):
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        refused(copy, match)
    (copy / "config.json").write_text("[]")
    refused(copy, "holds a list")
    (copy / "config.json").write_text("{")
    refused(copy, "not JSON")


def test_a_name_that_is_not_cached_is_refused_at_once(tmp_path):
    """In a process of its own, with an empty cache and a proxy that answers nobody: nothing is asked of the network."""
    code = (
        "import perturbkit.audit as a\n"
        "try: a.open_model('hf:some/model@main')\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HTTPS_PROXY": "http://192.0.2.1:9"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.startswith("ModelError hf:some/model@main is not in the local cache")
    assert "hf download some/model" in ended.stdout


def test_a_name_in_the_cache(text_folder, tmp_path):
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("a" * 40)
    shutil.copytree(text_folder, snapshot)
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    code = "import perturbkit.audit as a\nm = a.open_model('hf:some/model')\nprint(m.name, m.classes)"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HOME": str(tmp_path)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert ended.stdout.strip() == "hf:some/model ('negative', 'positive')", ended.stderr
    assert ended.stderr == ""


def bare_folder(here, unknown, pad="<end>", end="<end>"):
    """A GPT-2 of one layer whose tokenizer frames nothing, so that an empty text has no tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    table = {w: i for i, w in enumerate(["<end>", "<unknown>", *GOOD, *BAD, "film"])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token=unknown))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A" if unknown == "<unknown>" else "<end> $A", special_tokens=[("<end>", 0)]
    )
    config = GPT2Config(
        vocab_size=len(table), n_embd=8, n_layer=1, n_head=2, n_positions=32, num_labels=2, bos_token_id=0,
        eos_token_id=0, pad_token_id=0 if pad else None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2ForSequenceClassification(config).save_pretrained(here)
    PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token=unknown, pad_token=pad, bos_token="<end>", eos_token=end
    ).save_pretrained(here)
    return str(here)


def test_a_text_of_no_tokens_fails_no_section(tmp_path):
    folder = bare_folder(tmp_path, "<unknown>")
    texts = [*TEXTS[:10], "", GOOD[0]]
    subject = audit.open_subject(folder, (texts, LABELS[:12]))
    alone, beside = subject.predict_texts([""]), subject.predict_texts(["", GOOD[0]])[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)
    report = audit.run(folder, (texts, LABELS[:12]), only=["explain", "certify"], progress=False)
    assert {f.section: f.status for f in report.findings if f.status == "failed"} == {}


def test_the_end_of_a_text_pads_where_nothing_else_does(tmp_path):
    folder = bare_folder(tmp_path / "end", "<unknown>", pad=None)
    subject = audit.open_subject(folder, (TEXTS, LABELS))
    assert any("'<end>', the end of a text, stands for it" in r for r in subject.remarks)
    few = [TEXTS[0], "film", " ".join(TEXTS[:3])]
    torch.testing.assert_close(
        subject.predict_texts(few), torch.cat([subject.predict_texts([t]) for t in few]), rtol=1e-4, atol=1e-5
    )
    folder = bare_folder(tmp_path / "none", "<unknown>", pad=None, end=None)
    with pytest.raises(checks.ModelError, match="neither a token for padding"):
        audit.open_subject(folder, (TEXTS, LABELS))


def test_a_token_that_means_several_things_tells_nothing_unknown(tmp_path):
    folder = bare_folder(tmp_path, "<end>")
    texts = [t.split()[0] for t in TEXTS]
    finding = audit.run(folder, (texts, LABELS), only=["sanity"], progress=False)["sanity"]
    rows = {row[0]: row for row in finding.table.rows}
    assert "words known to the tokenizer" not in rows
    assert rows["texts read to their end"][2] == "passed"
    assert "tokens are unknown" not in finding.headline
