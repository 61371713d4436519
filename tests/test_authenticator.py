"""The authenticators, over real stores and a clock that tests move."""

from __future__ import annotations

import pytest

from papaours_auth import Authenticator, Keys, PepperRing, Reason, Refused
from papaours_auth.stores import Store

SEED = "pk_prod_abc123def456ghi789"


def test_the_seeds_key_is_accepted_and_refused_once_disabled(
    store: Store, keys: Keys, ring: PepperRing
) -> None:
    machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
    key = keys.import_key(machine.id, SEED, name="Production - Service Facturation")
    authenticator = Authenticator(store, environment="prod", peppers=ring, watch=False)
    authenticator.refresh()
    assert authenticator.authenticate(SEED).key.id == key.id
    keys.disable_key(key.id)
    authenticator.refresh()
    with pytest.raises(Refused) as refusal:
        authenticator.authenticate(SEED)
    assert refusal.value.reason is Reason.KEY_INACTIVE
    authenticator.close()
