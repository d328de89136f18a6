"""Shapley values of voice and face in human votes on the emotion of CREMA-D's clips (Cao et al., 2014)."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from mmfast import ops

EMOTIONS = "ADFHNS"
INTENDED = {"ANG": "A", "DIS": "D", "FEA": "F", "HAP": "H", "NEU": "N", "SAD": "S"}
# First digit of a row's number; bit 0 of a coalition is the voice, bit 1 the face.
COALITIONS = {"1": 0b01, "2": 0b10, "3": 0b11}


def votes_path() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("MMFAST_TEST_DATA", beside)) / "crema_d_votes" / "tabulatedVotes.csv"


@pytest.mark.skipif(not votes_path().is_file(), reason=f"needs {votes_path()} (set MMFAST_TEST_DATA)")
def test_voice_and_face_in_human_votes():
    utilities: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    with votes_path().open(newline="") as file:
        for row in csv.DictReader(file):
            votes = [int(row[emotion]) for emotion in EMOTIONS]
            # index() takes the first of the most-voted emotions.
            felt = EMOTIONS[votes.index(max(votes))]
            clip = row["fileName"]
            utilities[clip][COALITIONS[row[""][0]]] = float(felt == INTENDED[clip.split("_")[2]])
    assert len(utilities) == 7442
    phi = ops.shapley_values(torch.tensor(list(utilities.values())))
    voice, face = phi.double().unbind(1)
    assert round(voice.mean().item(), 4) == 0.2567
    assert round(face.mean().item(), 4) == 0.4916
    assert round(100 * (face > voice).double().mean().item(), 2) == 31.08
    assert round(100 * (voice > face).double().mean().item(), 2) == 7.59
