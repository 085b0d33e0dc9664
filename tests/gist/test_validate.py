"""The checks of settings: what passes, and the sentences of what does not."""

from __future__ import annotations

import math
import re

import pytest

from gist import validate


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (
            validate.check_count,
            (1, 7),
            (0, -1, 1.0, True, "2"),
            "x must be an integer of at least 1",
        ),
        (validate.check_finite, (-1.5, 0), (math.inf, math.nan), "x must be finite"),
        (
            validate.check_non_negative,
            (0, 2.5),
            (-1e-9, math.inf, math.nan),
            "x must be a finite number, at least 0",
        ),
        (validate.check_rate, (0, 0.99), (-0.1, 1, math.nan), "x must be in [0, 1)"),
    ],
)
def test_a_range(check, good, bad, message):
    for value in good:
        check("x", value)
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"{message}; it is")):
            check("x", value)


def test_a_range_that_another_setting_ends():
    validate.check_between("stop", 3, 0, 3, "epochs")
    with pytest.raises(ValueError, match="^stop must be from 0 to epochs, 3; it is 4$"):
        validate.check_between("stop", 4, 0, 3, "epochs")


def test_at_least():
    validate.check_at_least("epochs", 1, 1)
    with pytest.raises(ValueError, match="^epochs must be at least 1; it is 0$"):
        validate.check_at_least("epochs", 0, 1)


def test_words():
    validate.check_choice("precision", "bf16", ("fp32", "bf16"))
    with pytest.raises(ValueError, match="^precision must be one of fp32, bf16; it is 'fp16'$"):
        validate.check_choice("precision", "fp16", ("fp32", "bf16"))
    validate.check_known("method", "lora", ("adapter", "lora"))
    with pytest.raises(ValueError, match="method: 'lore' is not known; did you mean 'lora'"):
        validate.check_known("method", "lore", ("adapter", "lora"))
    validate.check_activation("gelu")
    with pytest.raises(ValueError, match="activation: 'gelo' is not known"):
        validate.check_activation("gelo")
