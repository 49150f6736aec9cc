"""The documentation's table of error reasons against the protocol and the server's codes."""

import re
from pathlib import Path

from moorage.v1 import moorage_pb2 as pb
from moorage_server.status import CODES

PAGE = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
ROWS = re.findall(
    r"^\| `(\w+)` \| (\w+) \| (.+) \|$",
    PAGE.partition("<!-- reasons -->")[2].partition("<!-- /reasons -->")[0],
    re.MULTILINE,
)


def test_every_reason_is_documented_and_no_other():
    listed = {
        name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.DESCRIPTOR.values_by_name
    }
    documented = [name for name, _, _ in ROWS]
    assert len(documented) == len(set(documented))
    assert set(documented) == listed - {"UNSPECIFIED"}


def test_their_codes_are_those_of_the_server():
    assert {name: code for name, code, _ in ROWS} == {n: code.name for n, code in CODES.items()}
