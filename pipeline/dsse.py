"""DSSE envelopes (https://github.com/secure-systems-lab/dsse, version 1) signed with OpenPGP keys."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from pipeline.errors import UserError
from pipeline.openpgp import verify_detached
from pipeline.signing import Signer

Envelope = dict[str, Any]


def envelope(payload: bytes, payload_type: str, signer: Signer, when: int) -> Envelope:
    """The envelope of a payload; its signature is a binary OpenPGP one over the payload and its type."""
    signature = signer.detached(_encoding(payload_type, payload), when, armor=False)
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {"keyid": signer.identity.fingerprint, "sig": base64.b64encode(signature).decode()},
        ],
    }


def open_envelope(envelope: object, public: bytes, payload_type: str) -> bytes:
    """The payload, once a key of `public` (ASCII armor) is seen to have signed it.

    `envelope` is what was parsed from JSON. Raises `UserError` when it is no envelope, is one of another type, or
    has no good signature.
    """
    try:
        if not isinstance(envelope, dict):
            raise TypeError
        found, encoded, signatures = (envelope[k] for k in ("payloadType", "payload", "signatures"))
        payload = base64.b64decode(encoded, validate=True)
        made = [base64.b64decode(signature["sig"], validate=True) for signature in signatures]
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise UserError("this is not a DSSE envelope", "get the file again from its source") from None
    if found != payload_type:
        raise UserError(f"this envelope holds {found}, not {payload_type}", "give the right file")
    refused = UserError("the envelope is not signed", "get the file again from its source")
    for signature in made:
        try:
            verify_detached(_encoding(payload_type, payload), signature, public)
        except UserError as error:
            refused = error
        else:
            return payload
    raise refused


def _encoding(payload_type: str, payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
