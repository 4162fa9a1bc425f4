"""Real files in the schemas of public sets: Parquet as `datasets` writes it, JSON, tar."""

import io
import json
import tarfile

from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pixels
from PIL import ImageDraw

TEXT = Value("string")


def picture(number: int, size=(64, 48), form="PNG", **options) -> bytes:
    """A small chart that is unlike that of any other number."""
    image = Pixels.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    width, height = size
    for bar in range(4):
        tall = (number * 37 + bar * 53) % 97 / 97 * height
        colour = ((number * 61) % 256, (number * 101 + 80 * bar) % 256, (bar * 60) % 256)
        draw.rectangle([bar * width / 4, height - tall, (bar + 0.7) * width / 4, height], colour)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def parquet(path, features: dict, rows: list[dict]) -> None:
    """Writes rows as `datasets` would upload them: pictures as structs of bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in features}
    Dataset.from_dict(columns, features=Features(features)).to_parquet(path)


def stored(data: bytes | None) -> dict | None:
    return None if data is None else {"bytes": data, "path": None}


def chartqa(folder, split: str, rows: list[tuple[bytes | None, str, list[str], int]]) -> None:
    features = {
        "image": Image(),
        "query": TEXT,
        "label": List(TEXT),
        "human_or_machine": ClassLabel(names=["human", "machine"]),
    }
    made = [dict(zip(features, (stored(image), *rest), strict=True)) for image, *rest in rows]
    parquet(folder / f"ChartQA/data/{split}-00000-of-00001.parquet", features, made)


def scienceqa(folder, split: str, rows: list[dict]) -> None:
    features = {
        "image": Image(),
        "question": TEXT,
        "choices": List(TEXT),
        "answer": Value("int8"),
        **dict.fromkeys(("hint", "task", "grade", "subject", "topic"), TEXT),
    }
    parquet(folder / f"ScienceQA/data/{split}-00000-of-00001-1a2b.parquet", features, rows)


def cauldron(folder, rows: list[tuple[list[bytes], list[tuple[str, str]]]]) -> None:
    features = {
        "images": List(Image()),
        "texts": List({"user": TEXT, "assistant": TEXT, "source": TEXT}),
    }
    made = [
        {
            "images": [stored(image) for image in images],
            "texts": [{"user": q, "assistant": a, "source": "AI2D"} for q, a in turns],
        }
        for images, turns in rows
    ]
    parquet(folder / "the_cauldron/ai2d/train-00000-of-00001.parquet", features, made)


def llava(folder, rows: list[tuple[bytes, list[tuple[str, str]]]]) -> None:
    features = {
        "id": TEXT,
        "image": Image(),
        "conversations": List({"from": TEXT, "value": TEXT}),
        "data_source": TEXT,
    }
    made = [
        {
            "id": str(number),
            "image": stored(image),
            "conversations": [{"from": who, "value": said} for who, said in turns],
            "data_source": "chartqa",
        }
        for number, (image, turns) in enumerate(rows)
    ]
    place = "LLaVA-OneVision-Data/chartqa(cauldron,llava_format)/train-00000-of-00001.parquet"
    parquet(folder / place, features, made)


def lines(path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))


def tar(path, samples: list[dict[str, bytes]], mode="w") -> None:
    """A WebDataset shard: a file for each ending of each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for number, sample in enumerate(samples):
            for ending, data in sample.items():
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
