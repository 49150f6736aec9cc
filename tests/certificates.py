"""Certificates for tests, made as they run."""

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """One that signs certificates, and the folder that they are written to."""

    ca: trustme.CA
    folder: Path

    @property
    def file(self) -> Path:
        return self._write(self.folder / "ca.pem", self.ca.cert_pem)

    def issue(self, name: str, *, expired: bool = False, file: str = "") -> Pair:
        """A certificate for a host; written anew, to files of the same names, if it is there."""
        end = datetime.datetime.now(datetime.UTC) - DAY if expired else None
        begin = end - DAY if end else None
        made = self.ca.issue_cert(name, not_before=begin, not_after=end)
        stem = self.folder / (file or name)
        stem.parent.mkdir(parents=True, exist_ok=True)
        cert = self._write(stem.with_suffix(".cert.pem"), made.cert_chain_pems[0])
        return Pair(cert, self._write(stem.with_suffix(".key.pem"), made.private_key_pem))

    def _write(self, path: Path, blob: trustme.Blob) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_to_path(str(path))
        return path


def authority(folder: Path) -> Authority:
    return Authority(trustme.CA(), folder)
