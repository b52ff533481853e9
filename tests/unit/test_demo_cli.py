"""What `octavo-demo` does when it is told nothing."""

from __future__ import annotations

from octavo_client.demo.cli import make_parser, quality_plan
from octavo_client.demo.model import DEFAULT_WEIGHTS, TinyLlama
from octavo_client.demo.quality import QualityPlan


def test_defaults() -> None:
    assert vars(make_parser().parse_args([])) == {
        "prompt": None,
        "target": None,
        "backend": None,
        "tokens": 240,
        "temperature": 0.8,
        "seed": 0,
        "quality_tokens": 4096,
        "weights": DEFAULT_WEIGHTS,
        "tls_ca": None,
        "tls_cert": None,
        "tls_key": None,
        "token_file": None,
        "allow_plaintext_token": False,
    }


def test_quality_is_measured_over_full_contexts() -> None:
    args, config = make_parser().parse_args(["--seed=7"]), TinyLlama.load().config
    plan = quality_plan(args, config)
    assert plan == QualityPlan(num_texts=4, text_len=1024, num_single=256, seed=7)


def test_quality_plan_rounds_up() -> None:
    args, config = make_parser().parse_args(["--quality-tokens=21"]), TinyLlama.load().config
    assert quality_plan(args, config) == QualityPlan(4, text_len=6, num_single=2, seed=0)
