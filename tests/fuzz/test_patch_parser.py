"""The fuzz harness on its corpus: every seed is a patch, and some thousand mutations of them find nothing.

`MODELPATCH_FUZZ=1000000` makes the long run whose figures stand in docs/reliability.md.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patch_parser import CORPUS, assemble, mutate, read_twice, split, try_input

from modelpatch.patch.codec import KINDS
from modelpatch.patch.contents import decode_patch

pytestmark = pytest.mark.slow

RUNS = int(os.environ.get("MODELPATCH_FUZZ", "3000"))
SECONDS = 1.0  # for one input
SEEDS = sorted(CORPUS.iterdir())


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.name)
def test_every_seed_is_a_patch(path: Path) -> None:
    assert try_input(path.read_bytes()) == 1


def test_the_seeds_hold_every_codec() -> None:
    text = b"".join(path.read_bytes() for path in SEEDS).decode("latin1")
    kinds = {*KINDS, "entropy-bits"}
    assert {kind for kind in kinds if re.search(rf'":"{kind}[":]', text)} == kinds


def test_the_parts_of_a_file_make_the_file_again() -> None:
    data = (CORPUS / "whole.safetensors").read_bytes()
    made = assemble(split(data))
    assert made is not None
    assert decode_patch(made).content_hash == decode_patch(data).content_hash
    assert not read_twice(made.replace(b"draft", b"graft"))  # the hash it was given is that of its bytes


def test_mutations_find_no_crash_and_no_input_that_takes_a_second() -> None:
    chance = random.Random(0)
    seeds = [path.read_bytes() for path in SEEDS]
    patches, slow = 0, []
    for _ in range(RUNS):
        data = mutate(chance.choice(seeds), chance)
        begin = time.process_time()
        patches += try_input(data)
        if (seconds := time.process_time() - begin) > SECONDS:
            slow.append((seconds, data))
        if chance.random() < 0.02:
            seeds.append(data)  # mutations of mutations
    assert slow == []
    assert 0 < patches < RUNS  # neither all refused nor all taken


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this system")
def test_the_coverage_guided_run_starts_and_finds_nothing(tmp_path: Path) -> None:
    harness = str(Path(__file__).with_name("patch_parser.py"))
    limits = ["-runs=2000", "-timeout=10", "-rss_limit_mb=2048", "-seed=1", f"-artifact_prefix={tmp_path}/crash-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    fresh = ["sh", "-c", '"$@"; exit $?', "sh"]  # a child's peak of memory begins with its parent's, here the shell's
    command = [*fresh, sys.executable, harness, str(tmp_path), str(CORPUS), *limits]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 2000 runs" in done.stderr
    assert not list(tmp_path.glob("crash-*"))
