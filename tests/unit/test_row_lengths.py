"""What is counted and prepared here is what xtuner's own dataset makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.datasets import jpeg, prepared, rows_of
from tests.phi3_model import write_phi3
from workers.inference.engines.base import Tiling
from workers.training.data_inputs import token_counter, token_rules
from workers.training.row_lengths import RowLengths, TokenRules
from workers.training.rows import Row, Turn

TINY = Path("workers/inference/tiny/checkpoint")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the code that xtuner needs in it."""
    from workers.inference.internvl.export import export_with_code

    out = tmp_path_factory.mktemp("base") / "base"
    export_with_code(TINY, out)
    return out


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with Phi-3 and a ``tokenizer.json``."""
    return written_phi3(tmp_path_factory.mktemp("phi3") / "base", fast_tokenizer=True)


@pytest.fixture(scope="module")
def published_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with Phi-3 and a sentencepiece file alone, as InternVL2-4B is published."""
    return written_phi3(tmp_path_factory.mktemp("published") / "base", fast_tokenizer=False)


def written_phi3(folder: Path, *, fast_tokenizer: bool) -> Path:
    pytest.importorskip("sentencepiece", reason="needs vlmq[training]")
    return write_phi3(folder, fast_tokenizer=fast_tokenizer)


def lengths_of(base: Path) -> RowLengths:
    rules = token_rules(base)
    return RowLengths(rules, token_counter(base, rules.family))


def conversation(image: str | None, *texts: str) -> dict[str, Any]:
    turns = [
        {"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)
    ]
    return {"conversations": turns, **({} if image is None else {"image": image})}


ROWS = [
    conversation("wide.jpg", "What is it?\n<image>", "A wide picture."),
    conversation("tall.jpg", "<image>", "  图中的菜是麻婆豆腐  "),
    conversation("small.png", "Look: <image> what colour?", "Grey.", "And {now}?", "Still % grey."),
    conversation("small.png", "Hello", "Hi.", "<image>\nWhat is this? 🍜", "Noodles\n\nin soup."),
    conversation(None, "No picture at all", "Indeed."),
    conversation("turned.jpg", "<image>\nWhich way?", "Upright."),
]


READ_BY_XTUNER = """
import json, sys
from workers.training.surroundings import prepare_imports

prepare_imports()
from xtuner.dataset.internvl_dataset import InternVL_V1_5_Dataset
from xtuner.utils.templates import PROMPT_TEMPLATE

base, data, template, end = sys.argv[1:]
read = InternVL_V1_5_Dataset(
    model_path=base,
    template=PROMPT_TEMPLATE[template],
    data_paths=f"{data}/train.json",
    image_folders=f"{data}/images",
    max_length=8192,
)
context, end = read.tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", end])


def answers(labels):
    # The texts that are learned, each with its end.
    learned, texts = [label for label in labels if label >= 0], []
    while learned:
        length = learned.index(end) + 1
        texts.append(read.tokenizer.decode(learned[:length]))
        learned = learned[length:]
    return texts


found = []
for index in range(len(read)):
    item = read.prepare_data(index)  # None where __getitem__ would take another row
    found.append(
        item
        and {
            "tokens": len(item["input_ids"]),
            "context": item["input_ids"].count(context),
            "tiles": item["pixel_values"].shape[0],
            "learned": answers(item["labels"]),
        }
    )
print(json.dumps({"patch_token": read.patch_token, "rows": found}))
"""


@pytest.mark.skipif(find_spec("xtuner") is None, reason="needs vlmq[training]")
@pytest.mark.parametrize(
    ("which", "template", "end", "exact"),
    [
        ("base", "internlm2_chat", "<|im_end|>", True),
        ("phi3", "phi3_chat", "<|end|>", True),
        ("published_phi3", "phi3_chat", "<|end|>", False),
    ],
)
def test_lengths_and_contents_are_those_of_xtuners_dataset(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    which: str,
    template: str,
    end: str,
    exact: bool,
) -> None:
    base: Path = request.getfixturevalue(which)
    images = tmp_path / "images"
    images.mkdir()
    (images / "wide.jpg").write_bytes(jpeg(1, (300, 60)))
    (images / "tall.jpg").write_bytes(jpeg(2, (50, 170)))
    (images / "small.png").write_bytes(jpeg(3, (20, 20), format="PNG"))
    (images / "turned.jpg").write_bytes(jpeg(4, (200, 50), exif=orientation(6)))
    lengths = lengths_of(base)
    report = prepared(tmp_path / "job", ROWS, lengths=lengths, folder=images, held_out_share=0)
    assert report.train == len(ROWS)
    assert report.exact_tokens == exact

    data = str(tmp_path / "job" / "data")
    command = [sys.executable, "-c", READ_BY_XTUNER, str(base), data, template, end]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    rows = rows_of(tmp_path / "job", "train")
    for row, item in zip(rows, read["rows"], strict=True):
        assert item is not None, "xtuner could not open an image that was found good"
        assert item["tokens"] == abs(row["length"]) if exact else "length" not in row
        assert item["tokens"] <= report.tokens.max
        assert item["context"] == ("image" in row) * item["tiles"] * read["patch_token"]
        answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        assert item["learned"] == [f"{text}{end}" for text in answers]
    # 200 by 50 pixels that a camera held upright.
    assert rows[-1]["image_wh"] == [50, 200]


def orientation(value: int) -> Any:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("which", ["base", "phi3"])
def test_without_a_tokenizer_no_row_is_counted_short(
    request: pytest.FixtureRequest, which: str
) -> None:
    base: Path = request.getfixturevalue(which)
    exact, upper = lengths_of(base), RowLengths(token_rules(base))
    for text in ("a", "Grey 灰色 🍜", "x" * 1000, "\n\n \t"):
        row = Row([Turn("human", text), Turn("gpt", text)], "a.jpg", 0)
        assert upper.tokens(row, (100, 50)) >= exact.tokens(row, (100, 50))
    assert not upper.is_exact


def test_an_image_counts_by_its_tiles() -> None:
    lengths = RowLengths(TokenRules(Tiling(448, 1, 12, thumbnail=True), 256), len)
    row = Row([Turn("human", "?"), Turn("gpt", "!")], "a.jpg", 0)
    one_tile = lengths.tokens(row, (448, 448))
    assert lengths.tokens(row, (1024, 768)) - one_tile == 12 * 256
    assert lengths.tokens(row, (896, 448)) - one_tile == 2 * 256
