"""What users are told who lack onnxruntime-qnn."""

import importlib.util

import pytest

from ffnet.chips import check_npu_package, has_wheel
from ffnet.npu import package as npu_package
from ffnet.system.errors import UserError


@pytest.fixture
def missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("system", "machine", "libc", "expected"),
    (
        ("linux", "x86_64", ("glibc", "2.35"), True),
        ("linux", "x86_64", ("glibc", "2.36"), True),
        ("linux", "x86_64", ("glibc", "2.31"), False),
        ("linux", "x86_64", ("", ""), False),  # musl
        ("linux", "aarch64", ("glibc", "2.39"), False),
        ("darwin", "arm64", ("", ""), False),
        ("win32", "AMD64", ("", ""), True),
        ("win32", "ARM64", ("", ""), True),
    ),
)
def test_the_package_has_wheels_for_some_platforms(system, machine, libc, expected):
    assert has_wheel(system, machine, libc) is expected


def test_a_missing_package_is_reported_with_the_command_that_installs_it(missing_package, monkeypatch):
    monkeypatch.setattr(npu_package, "has_wheel", lambda *_: True)
    with pytest.raises(UserError, match="^--npu: .*not installed.*pip install -r requirements-npu.txt"):
        check_npu_package()


def test_a_platform_without_a_wheel_is_named(missing_package, monkeypatch):
    monkeypatch.setattr(npu_package, "has_wheel", lambda *_: False)
    with pytest.raises(UserError, match="^--npu: onnxruntime-qnn does not exist for .* on .*Use such a PC"):
        check_npu_package()
