"""Sizes read and written, and the environment read in one place."""

import logging
import mmap

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from torch_vtensor.settings import GIB, KIB, MIB, Settings, format_bytes, load_settings, parse_bytes


@given(st.integers(min_value=0, max_value=2**70))
@example(0)
@example(1024**5)
def test_sizes_are_read_back_as_written(num_bytes: int) -> None:
    text = format_bytes(num_bytes)
    assert parse_bytes(text) == num_bytes
    assert parse_bytes(text.lower().replace(" ", "")) == num_bytes


@given(st.integers(min_value=1, max_value=2**40), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_size_is_written_in_the_largest_unit_that_divides_it(count: int, unit: str) -> None:
    number, written = format_bytes(parse_bytes(f"{count}{unit}")).split()
    assert int(number) % KIB or written == "TiB"
    assert int(number) <= count


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("65536", 65536),
        ("8GiB", 8 * GIB),
        ("512MiB", 512 * MIB),
        (" 1.5 gib ", 3 * GIB // 2),
        ("0.5KiB", 512),
    ],
)
def test_sizes_as_people_write_them(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8GB", "8G", "1e9", "1_000", "٣", "8 GiB each", ".5GiB"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="8 GiB or 512MiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


def test_part_of_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number of bytes"):
        parse_bytes("1.0001KiB")


def test_negative_size_is_not_written() -> None:
    with pytest.raises(ValueError, match="-1"):
        format_bytes(-1)


def test_empty_environment_gives_the_defaults() -> None:
    assert load_settings({}) == Settings(
        enable=False, budget_bytes=None, page_bytes=64 * KIB, log_level=logging.WARNING
    )
    assert load_settings({"TORCH_VTENSOR_BUDGET_BYTES": " ", "HOME": "/"}) == Settings()


def test_every_variable_is_read() -> None:
    environ = {
        "TORCH_VTENSOR_ENABLE": "on",
        "TORCH_VTENSOR_BUDGET_BYTES": "8GiB",
        "TORCH_VTENSOR_PAGE_BYTES": "1MiB",
        "TORCH_VTENSOR_IDLE_SECONDS": "0.5",
        "TORCH_VTENSOR_LOG": "debug",
    }
    assert load_settings(environ) == Settings(
        enable=True, budget_bytes=8 * GIB, page_bytes=MIB, idle_seconds=0.5, log_level=logging.DEBUG
    )
    assert load_settings({"TORCH_VTENSOR_IDLE_SECONDS": "never"}).idle_seconds is None


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_VTENSOR_BUDGET_BYTES", "12345")
    assert load_settings().budget_bytes == 12345


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("ENABLE", "maybe", "use 1 or 0"),
        ("BUDGET_BYTES", "8GB", "8 GiB or 512MiB"),
        ("BUDGET_BYTES", "0", "Leave it unset"),
        ("PAGE_BYTES", str(mmap.PAGESIZE // 2), "Try 64KiB"),
        ("PAGE_BYTES", str(mmap.PAGESIZE * 3), "Try 64KiB"),
        ("IDLE_SECONDS", "soon", "such as 5 or 0.5, or 'never'"),
        ("IDLE_SECONDS", "0", "give more than 0 seconds, or 'never'"),
        ("IDLE_SECONDS", "inf", "give more than 0 seconds, or 'never'"),
        ("LOG", "loud", "DEBUG, INFO"),
    ],
)
def test_bad_value_is_refused_with_the_remedy(name: str, text: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"^TORCH_VTENSOR_{name}={text}: ") as caught:
        load_settings({f"TORCH_VTENSOR_{name}": text})
    assert remedy in str(caught.value)


def test_misspelt_variable_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="TORCH_VTENSOR_BUGDET is not a setting") as caught:
        load_settings({"TORCH_VTENSOR_BUGDET": "1"})
    assert "TORCH_VTENSOR_BUDGET_BYTES" in str(caught.value)
