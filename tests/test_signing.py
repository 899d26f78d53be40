"""Keys from everywhere they may come from, signatures, and that no secret gets out."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline import dsse, gnupg, signing
from pipeline.errors import UserError
from pipeline.openpgp import keyring, merged
from pipeline.signing import Signer, ensure, identity, verify_clearsigned, verify_detached
from tests.packaging import gnupg_home, gpg, make_key, make_package

NAME = "Signer of tests <signer@example.org>"
Environment = Mapping[str, str]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_key(tmp_path_factory.mktemp("key"), NAME)


@pytest.fixture
def environ(secret: bytes) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], signing.KEY: secret.decode()}


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without a key; development keys are made quickly."""
    monkeypatch.setattr(signing, "DEVELOPMENT_ALGORITHM", "rsa2048")
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}


# The development key --------------------------------------------------------------------------


def test_a_development_key_is_made_once_private_and_says_what_it_is(
    bare: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "config"
    assert identity(bare, config) is None and not config.exists()
    made = ensure(bare, config)
    assert made.development and gnupg.NOT_FOR_RELEASE in made.name
    assert identity(bare, config) == made == ensure(bare, config)
    directory = config / signing.DEVELOPMENT_KEY
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "secret.asc").stat().st_mode & 0o777 == 0o600
    with Signer(bare, config) as signer:
        assert signer.identity == made
        signature = signer.detached(b"data", made.created)
    assert verify_detached(b"data", signature, made.public) == made.fingerprint


def test_the_development_key_is_as_strong_as_rpm_and_apt_like_it() -> None:
    assert signing.DEVELOPMENT_ALGORITHM == "rsa4096"


def test_who_asks_at_the_same_time_gets_the_same_development_key(
    bare: dict[str, str], tmp_path: Path
) -> None:
    found: list[str] = []
    asking = [
        threading.Thread(target=lambda: found.append(ensure(bare, tmp_path / "config").fingerprint))
        for _ in range(3)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert [p.name for p in (tmp_path / "config").iterdir() if p.is_dir()] == [signing.DEVELOPMENT_KEY]


def test_a_development_key_stays_one_when_it_is_named(bare: dict[str, str], tmp_path: Path) -> None:
    ensure(bare, tmp_path / "config")
    secret = (tmp_path / "config" / signing.DEVELOPMENT_KEY / "secret.asc").read_text()
    named = identity(bare | {signing.KEY: secret}, tmp_path / "elsewhere")
    assert named is not None and named.development


def test_a_development_key_that_others_can_read_is_refused(bare: dict[str, str], tmp_path: Path) -> None:
    ensure(bare, tmp_path)
    (tmp_path / signing.DEVELOPMENT_KEY).chmod(0o750)
    with pytest.raises(UserError, match="open to other users") as refused:
        identity(bare, tmp_path)
    assert refused.value.hint.startswith("chmod 700 ")


def test_a_damaged_development_key_is_named(bare: dict[str, str], tmp_path: Path) -> None:
    ensure(bare, tmp_path)
    (tmp_path / signing.DEVELOPMENT_KEY / "identity.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        identity(bare, tmp_path)


def test_a_development_key_without_its_secret_part_is_named(bare: dict[str, str], tmp_path: Path) -> None:
    ensure(bare, tmp_path)
    (tmp_path / signing.DEVELOPMENT_KEY / "secret.asc").unlink()
    assert "is damaged" in refused(bare, tmp_path).message


def test_a_place_that_takes_no_key_is_named(bare: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a file")
    with pytest.raises(UserError, match="no development key can be made in .*/config: "):
        ensure(bare, tmp_path / "config")


# Keys of the user -----------------------------------------------------------------------------


def test_text_file_and_agent_bring_the_same_key_and_the_same_signatures(
    environ: dict[str, str], secret: bytes, tmp_path: Path
) -> None:
    (tmp_path / "key.asc").write_bytes(secret)
    path = {"PATH": os.environ["PATH"]}
    with gnupg_home(tmp_path) as home:
        gpg(home, "--import", data=secret)
        expected = identity(environ, tmp_path / "none")
        assert expected is not None and expected.name == NAME and not expected.development
        made = []
        for each in (
            environ,
            path | {signing.KEY_FILE: str(tmp_path / "key.asc")},
            path | {signing.KEY_ID: expected.fingerprint, "GNUPGHOME": home},
        ):
            assert identity(each, tmp_path / "none") == expected
            with Signer(each, tmp_path / "none") as signer:
                when = signer.identity.created + 7
                made.append((signer.detached(b"data", when), signer.clearsigned(b"text\n", when)))
        # the user's agent and keys are as they were
        assert expected.fingerprint in gpg(home, "--list-secret-keys").decode()
    assert made[0] == made[1] == made[2]
    assert verify_detached(b"data", made[0][0], expected.public) == expected.fingerprint
    assert verify_clearsigned(made[0][1], expected.public) == b"text\n"
    assert not (tmp_path / "none").exists()


def test_a_key_with_a_passphrase(tmp_path: Path) -> None:
    secret = make_key(tmp_path, NAME, passphrase="correct horse").decode()  # noqa: S106
    environ = {"PATH": os.environ["PATH"], signing.KEY: secret}
    with Signer(environ | {gnupg.PASSPHRASE: "correct horse"}, tmp_path) as signer:
        signature = signer.detached(b"data", signer.identity.created)
        rpm = make_package(tmp_path / "rpm", "one", format_="rpm")
        signer.sign_rpms([rpm], signer.identity.created)
    verify_detached(b"data", signature, signer.identity.public)
    for wrong in ({}, {gnupg.PASSPHRASE: "wrong"}):
        with (
            Signer(environ | wrong, tmp_path) as signer,
            pytest.raises(UserError, match="gpg failed: ") as no,
        ):
            signer.detached(b"data", signer.identity.created)
        assert "correct horse" not in no.value.message and gnupg.PASSPHRASE in no.value.hint


def test_a_signing_subkey_signs_and_the_primary_key_is_who_signs(tmp_path: Path) -> None:
    with gnupg_home(tmp_path) as home:
        unlocked = ["--passphrase", ""]
        gpg(home, *unlocked, "--quick-gen-key", NAME, "rsa2048", "cert", "never")
        primary = gpg(home, "--with-colons", "--list-keys").decode().split("fpr:::::::::")[1].split(":")[0]
        gpg(home, *unlocked, "--quick-add-key", primary, "rsa2048", "sign", "never")
        environ = {
            "PATH": os.environ["PATH"],
            signing.KEY: gpg(home, "--armor", "--export-secret-subkeys").decode(),
        }
    with Signer(environ, tmp_path) as signer:
        assert signer.identity.fingerprint == primary
        signature = signer.detached(b"data", signer.identity.created)
    assert verify_detached(b"data", signature, signer.identity.public) == primary


def refused(environ: Environment, config: Path) -> UserError:
    with pytest.raises(UserError) as error, Signer(environ, config) as signer:
        signer.detached(b"data", signer.identity.created)
    return error.value


def test_what_is_no_usable_key_is_refused_and_named(secret: bytes, tmp_path: Path) -> None:
    path = {"PATH": os.environ["PATH"]}
    (tmp_path / "empty").touch()
    both = refused(path | {signing.KEY: secret.decode(), signing.KEY_ID: "A"}, tmp_path)
    assert both.message == "VIRT_RT_SIGNING_KEY and VIRT_RT_SIGNING_KEY_ID are set"
    for environ, message in (
        ({signing.KEY: "no key"}, "what VIRT_RT_SIGNING_KEY holds is no secret key that GnuPG can read"),
        ({signing.KEY_FILE: str(tmp_path / "empty")}, "empty (VIRT_RT_SIGNING_KEY_FILE) is no secret key"),
        ({signing.KEY_FILE: str(tmp_path / "none")}, "No such file or directory"),
        ({signing.KEY_ID: "nobody", "GNUPGHOME": str(tmp_path)}, "the key nobody (VIRT_RT_SIGNING_KEY_ID)"),
        ({signing.KEY_ID: "--version", "GNUPGHOME": str(tmp_path)}, "the key --version"),
        ({signing.KEY: (secret + make_key(tmp_path, "B <b@example.org>")).decode()}, "is several keys"),
        ({signing.KEY: secret.decode(), signing.OTHER_KEYS: str(tmp_path / "none")}, "VIRT_RT_OTHER_KEYS: "),
        ({signing.KEY: secret.decode(), signing.OTHER_KEYS: str(tmp_path / "empty")}, "no public key"),
        ({signing.KEY_FILE: "~nobody-of-that-name/key"}, "nobody-of-that-name/key: Could not determine"),
    ):
        assert message in refused(path | environ, tmp_path / "config").message
    public = identity(path | {signing.KEY: secret.decode()}, tmp_path)
    assert public is not None
    only_public = refused(path | {signing.KEY: public.public.decode()}, tmp_path)
    assert only_public.message == "what VIRT_RT_SIGNING_KEY holds is no secret key that GnuPG can read"


@pytest.mark.parametrize("variable", [signing.KEY_FILE, signing.KEY_ID, signing.OTHER_KEYS])
@pytest.mark.parametrize("end", ["\n", " "])
def test_a_key_in_the_wrong_variable_is_not_shown(
    variable: str, end: str, environ: dict[str, str], secret: bytes, tmp_path: Path
) -> None:
    """Messages are in the logs of CI; a key id is an argument of a process."""
    named = environ if variable == signing.OTHER_KEYS else {"PATH": os.environ["PATH"]}
    error = refused(named | {variable: secret.decode().replace("\n", end)}, tmp_path)
    assert error.message == f"{variable} holds a text, not a name" and signing.KEY in error.hint


def test_a_key_that_cannot_sign_and_one_that_has_expired_are_refused(tmp_path: Path) -> None:
    with gnupg_home(tmp_path) as home:
        gpg(home, "--passphrase", "", "--quick-gen-key", NAME, "rsa2048", "cert", "never")
        certifies = gpg(home, "--armor", "--export-secret-keys").decode()
    with gnupg_home(tmp_path) as home:
        early = ["--faked-system-time", "20200101T000000!", "--passphrase", ""]
        gpg(home, *early, "--quick-gen-key", NAME, "rsa2048", "sign,cert", "1d")
        expired = gpg(home, "--armor", "--export-secret-keys").decode()
    path = {"PATH": os.environ["PATH"]}
    assert "cannot sign" in refused(path | {signing.KEY: certifies}, tmp_path).message
    gone = refused(path | {signing.KEY: expired}, tmp_path)
    assert "has expired" in gone.message and "docs/signing.md" in gone.hint


def test_a_key_that_was_revoked_is_refused(tmp_path: Path) -> None:
    with gnupg_home(tmp_path) as home:
        gpg(home, "--passphrase", "", "--quick-gen-key", NAME, "rsa2048", "sign,cert", "never")
        (revocation,) = (Path(home) / "openpgp-revocs.d").iterdir()
        # a colon keeps it from being imported by mistake
        gpg(home, "--import", data=revocation.read_bytes().replace(b":-----BEGIN", b"-----BEGIN"))
        revoked = gpg(home, "--armor", "--export-secret-keys").decode()
    error = refused({"PATH": os.environ["PATH"], signing.KEY: revoked}, tmp_path)
    assert "cannot sign" in error.message and "revoked" in error.hint


def test_a_time_before_the_key_is_refused(environ: dict[str, str], tmp_path: Path) -> None:
    rpm = make_package(tmp_path / "rpm", "one", format_="rpm")
    with Signer(environ, tmp_path) as signer:
        for sign in (
            lambda: signer.detached(b"data", 1),
            lambda: signer.clearsigned(b"data", 1),
            lambda: signer.sign_rpms([rpm], 1),
        ):
            with pytest.raises(UserError, match="1970-01-01 00:00:01 UTC is older than its key"):
                sign()


def test_without_the_tools_the_remedy_is_told(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gpg is not installed") as missing:
        identity(environ | {"PATH": str(tmp_path)}, tmp_path)
    assert missing.value.hint == "scripts/setup make installs it"


# rpms -----------------------------------------------------------------------------------------


def test_signed_rpms_are_equal_each_time_and_rpm_accepts_them(
    environ: dict[str, str], tmp_path: Path
) -> None:
    rpms = [make_package(tmp_path / where, name, format_="rpm") for where in "ab" for name in ("one", "two")]
    with Signer(environ, tmp_path) as signer:
        signer.sign_rpms([], signer.identity.created)
        for half in (rpms[:2], rpms[2:]):
            signer.sign_rpms(half, signer.identity.created)
        once = [rpm.read_bytes() for rpm in rpms]
        signer.sign_rpms(rpms[:1], signer.identity.created)  # again: nothing is added
        with pytest.raises(UserError, match="rpmsign failed: "):
            signer.sign_rpms([tmp_path / "none.rpm"], signer.identity.created)
    assert once[:2] == once[2:] and rpms[0].read_bytes() == once[0]
    (tmp_path / "key.asc").write_bytes(signer.identity.public)
    keys = ["rpmkeys", "--dbpath", str(tmp_path / "db")]
    subprocess.run([*keys, "--import", tmp_path / "key.asc"], check=True)
    done = subprocess.run(
        [*keys, "--checksig", "-v", *rpms], capture_output=True, text=True, check=True
    ).stdout
    assert done.count("RSA/SHA256 Signature") >= 4 and "NOKEY" not in done and "NOT OK" not in done


# Verification ---------------------------------------------------------------------------------


def test_a_signature_counts_for_its_data_and_key_only(
    environ: dict[str, str], secret: bytes, tmp_path: Path
) -> None:
    other = {"PATH": os.environ["PATH"], signing.KEY: make_key(tmp_path, "B <b@example.org>").decode()}
    with Signer(environ, tmp_path) as signer, Signer(other, tmp_path) as stranger:
        when = signer.identity.created
        signature, signed = signer.detached(b"data", when), signer.clearsigned(b"- text\n\nmore\n", when)
        ours, theirs = signer.identity.public, stranger.identity.public
        binary = signer.detached(b"data", when, armor=False)
    both = merged(theirs, ours)
    assert both.count(b"BEGIN PGP") == 1 and keyring(both) == keyring(theirs) + keyring(ours)
    for public in (ours, both, theirs + ours):
        for each in (signature, binary):
            assert verify_detached(b"data", each, public) == signer.identity.fingerprint
        assert verify_clearsigned(signed, public) == b"- text\n\nmore\n"
    assert verify_clearsigned(b"not signed\n" + signed + b"nor this\n", ours) == b"- text\n\nmore\n"
    for data, bad, public, message in (
        (b"Data", signature, ours, "the signature is wrong"),
        (b"data", signature, theirs, "the signature is of another key"),
        (b"data", b"", ours, "no signature that gpgv can read"),
        (b"data", signature, b"nothing", "no public key"),
        (b"data", signature, ours.replace(b"\n", b"\n!", 9), "no public key"),
    ):
        with pytest.raises(UserError, match=message):
            verify_detached(data, bad, public)
    for bad in (signed.replace(b"more", b"less"), b"text\n", signature):
        with pytest.raises(UserError):
            verify_clearsigned(bad, ours)


def test_a_signature_of_a_key_that_has_expired_is_refused(tmp_path: Path) -> None:
    with gnupg_home(tmp_path) as home:
        early = ["--faked-system-time", "20200101T000000!", "--passphrase", ""]
        gpg(home, *early, "--quick-gen-key", NAME, "rsa2048", "sign,cert", "1d")
        signature = gpg(home, *early, "--armor", "--detach-sign", data=b"data")
        public = gpg(home, "--armor", "--export")
    with pytest.raises(UserError, match="has expired or was revoked"):
        verify_detached(b"data", signature, public)


def test_gpg_itself_reads_merged_keys(environ: dict[str, str], bare: dict[str, str], tmp_path: Path) -> None:
    ensure(bare, tmp_path)
    (tmp_path / "other.asc").write_bytes((tmp_path / signing.DEVELOPMENT_KEY / "public.asc").read_bytes())
    with Signer(environ | {signing.OTHER_KEYS: str(tmp_path / "other.asc")}, tmp_path) as signer:
        trusted = signer.trusted
    with gnupg_home(tmp_path) as home:
        gpg(home, "--import", data=trusted)
        assert gpg(home, "--with-colons", "--list-keys").decode().count("pub:") == 2


def test_envelopes_open_for_their_key_and_type_only(environ: dict[str, str], tmp_path: Path) -> None:
    with Signer(environ, tmp_path) as signer:
        made = dsse.envelope(b"payload", "text/plain", signer, signer.identity.created)
        again = dsse.envelope(b"payload", "text/plain", signer, signer.identity.created)
    public = signer.identity.public
    assert made == again and made["signatures"][0]["keyid"] == signer.identity.fingerprint
    assert dsse.open_envelope(made, public, "text/plain") == b"payload"
    # by the letter of the specification's example
    assert dsse._encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    forged = made | {"payload": base64.b64encode(b"Payload").decode()}
    for bad, kind, message in (
        (made, "text/html", "holds text/plain, not text/html"),
        (forged, "text/plain", "the signature is wrong"),
        (made | {"payloadType": "text/html"}, "text/html", "the signature is wrong"),
        (made | {"signatures": []}, "text/plain", "not signed"),
        (made | {"signatures": [{"sig": "!"}]}, "text/plain", "no DSSE envelope|not a DSSE envelope"),
        (made | {"signatures": 3}, "text/plain", "not a DSSE envelope"),
        ({}, "text/plain", "not a DSSE envelope"),
        ([], "text/plain", "not a DSSE envelope"),
        (made | {"payload": 3}, "text/plain", "not a DSSE envelope"),
    ):
        with pytest.raises(UserError, match=message):
            dsse.open_envelope(bad, public, kind)


# Secrets --------------------------------------------------------------------------------------


def homes() -> set[Path]:
    bases = (Path(f"/run/user/{os.getuid()}"), Path("/dev/shm"), Path(tempfile.gettempdir()))  # noqa: S108
    mine = f"virt-rt-signing.{os.getpid()}.*"  # others may be signing, too
    return {path for base in bases if base.is_dir() for path in base.glob(mine)}


def test_the_private_directory_is_private_in_memory_and_goes(environ: dict[str, str], tmp_path: Path) -> None:
    before = homes()
    with pytest.raises(RuntimeError), Signer(environ, tmp_path) as signer:
        (home,) = homes() - before
        assert home.stat().st_mode & 0o777 == 0o700 and home.parent != Path(tempfile.gettempdir())
        signer.detached(b"data", signer.identity.created)
        raise RuntimeError
    assert homes() == before
    agents = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(home) not in agents or _ends(str(home))


def _ends(home: str) -> bool:
    """Whether the agent of that directory ends within seconds."""
    for _ in range(50):
        if (
            home
            not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        ):
            return True
        time.sleep(0.1)
    return False


def test_what_a_killed_run_left_is_removed_by_the_next(environ: dict[str, str], tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with gnupg.private_home() as mine:
        left = mine.with_name(f"virt-rt-signing.{gone.pid}.left")
        left.mkdir(mode=0o700)
        (left / "passphrase").write_text("secret")
        # somebody else's trap
        precious = tmp_path / "precious"
        precious.mkdir(mode=0o755)
        (precious / "file").touch()
        trap = left.with_name(f"virt-rt-signing.{gone.pid}.trap")
        trap.symlink_to(precious)
        try:
            assert identity(environ, tmp_path) is not None
            assert not left.exists() and mine.exists()
            assert (precious / "file").exists() and precious.stat().st_mode & 0o777 == 0o755
        finally:
            trap.unlink()


def test_no_secret_is_in_arguments_or_environment_of_a_process(
    environ: dict[str, str], secret: bytes, tmp_path: Path
) -> None:
    spied = tmp_path / "spied"
    (tmp_path / "bin").mkdir()
    for tool in ("gpg", "gpgconf", "rpmsign"):
        spy = tmp_path / "bin" / tool
        spy.write_text(
            f'#!/bin/sh\n{{ printf "%s\\n" "$0" "$@"; env; }} >>{spied}\nexec {shutil.which(tool)} "$@"\n'
        )
        spy.chmod(0o755)
    locked = make_key(tmp_path, NAME, passphrase="open sesame")  # noqa: S106
    rpm = make_package(tmp_path / "rpm", "one", format_="rpm")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for key, more in ((secret, {}), (locked, {gnupg.PASSPHRASE: "open sesame"})):
        with Signer({"PATH": path, signing.KEY: key.decode(), **more}, tmp_path) as signer:
            signer.detached(b"data", signer.identity.created)
            signer.clearsigned(b"data", signer.identity.created)
            signer.sign_rpms([rpm], signer.identity.created)
    said = spied.read_text()
    assert "--detach-sign" in said and "--addsign" in said and "GNUPGHOME=" in said
    assert "sesame" not in said and "PRIVATE KEY" not in said and signing.KEY not in said
