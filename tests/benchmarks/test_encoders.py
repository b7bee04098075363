"""The benchmark of published encoders: it compares with the definition, and prints one row for each call."""

from __future__ import annotations

import json

from benchmarks import encoders


def test_every_encoder_is_measured(tmp_path, capsys):
    out = tmp_path / "encoders.json"
    encoders.run(out, rounds=2, tokens=301)
    rows = json.loads(out.read_text())["rows"]
    assert [row["encoder"] for row in rows] == list(encoders.ENCODERS)
    assert all(row["error"] < 1e-5 and row["forward_backward"]["over_pairs"] > 0 for row in rows)
    assert capsys.readouterr().out.count("fwd+bwd") == len(rows)
