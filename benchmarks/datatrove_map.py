"""The same map as `noop`'s, the way a user of datatrove runs it on Slurm.

Run with a Python that has datatrove (tried with 0.10.1) and orjson:

    python datatrove_map.py FOLDER --tasks 2000 --workers 16 --per-job 125
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def make_input(folder: Path, files: int, rows: int) -> None:
    import zstandard

    folder.mkdir(parents=True)
    for index in range(files):
        numbers = range(index * rows, (index + 1) * rows)
        text = "".join(f'{{"id": "n:{n}", "text": "nothing to do"}}\n' for n in numbers)
        (folder / f"{index:05d}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--per-job", type=int, required=True)
    parser.add_argument("--keys", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--make", action="store_true", help="only make the input")
    words = parser.parse_args()
    if words.make:
        make_input(words.folder / "input", words.tasks, words.keys)
        return
    pause = words.pause

    def copy(data, rank, world_size):
        import time  # pickled by value, without the names around it

        for document in data:
            if pause:
                time.sleep(pause)
            yield document

    # Shards are zstd in both systems; a task reads one and writes one.
    steps = [
        JsonlReader(str(words.folder / "input"), compression="zstd"),
        *([copy] if pause else []),
        JsonlWriter(str(words.folder / "output"), compression="zstd"),
    ]
    executor = SlurmPipelineExecutor(
        job_name="map",
        pipeline=steps,
        tasks=words.tasks,
        workers=words.workers,
        tasks_per_job=words.per_job,
        time="00:30:00",
        partition="batch",
        mem_per_cpu_gb=1,
        venv_path=str(Path(sys.prefix) / "bin" / "activate"),
        logging_dir=str(words.folder / "logs"),
    )
    executor.run()
    told = {"job": executor.job_id, "version": importlib.metadata.version("datatrove")}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
