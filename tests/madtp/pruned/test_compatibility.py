"""Every kind of host in every use: it works, or the word said is the one in docs/compatibility.md."""

from __future__ import annotations

import pytest
from compatibility import BUILDERS, REFUSED, USES, Use, host, table
from project_paths import ROOT

import madtp

# Other tests use models of these libraries in most of these ways; a rewrite of each for this table alone takes minutes.
KINDS = [
    pytest.param(kind, marks=pytest.mark.slow if kind in ("timm", "hand-written") else pytest.mark.heavy)
    for kind in BUILDERS
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.run.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_host_in_a_use(kind: str, use: Use) -> None:
    if use.outcome == REFUSED:
        with pytest.raises(madtp.MadtpError):
            use.run(host(kind))
    else:
        use.run(host(kind))


def test_the_table_is_printed_in_the_docs() -> None:
    assert table() in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
