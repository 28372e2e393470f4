"""Options whose value may be left out."""

from __future__ import annotations

import pytest

from qins.cli.options import with_addresses

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("quantize a b", "quantize a b"),
        ("quantize --ray a b", "quantize --ray= a b"),
        ("quantize a b --ray", "quantize a b --ray="),
        ("quantize --ray --exact a b", "quantize --ray= --exact a b"),
        ("quantize --ray 10.0.0.1:6379 a b", "quantize --ray 10.0.0.1:6379 a b"),
        ("quantize --ray head-0.local:6379 a b", "quantize --ray head-0.local:6379 a b"),
        ("quantize --ray [::1]:6379 a b", "quantize --ray [::1]:6379 a b"),
        ("quantize --ray ray://head:10001 a b", "quantize --ray ray://head:10001 a b"),
        ("quantize --ray auto a b", "quantize --ray auto a b"),
        ("quantize --ray=x:1 a s3://b/c", "quantize --ray=x:1 a s3://b/c"),
        ("quantize --ray s3://a/b c", "quantize --ray= s3://a/b c"),
        ("quantize a b -- --ray", "quantize a b -- --ray"),
        ("quantize --ray -- a b", "quantize --ray= -- a b"),
    ],
)
def test_addresses(line, expected):
    assert with_addresses(line.split()) == expected.split()
