"""Makes PEFT know the method: once, in whatever order `peft` and `srde` are imported."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

NAME = "SRDE"


def register_srde() -> PeftType:
    """Registers the method with PEFT if it is not yet, and returns its `PeftType`.

    PEFT looks types up in an enum, and plain strings break `load_adapter`: so the enum gains a real member.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        PeftType._member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    peft_type = PeftType(NAME)
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        from srde.tuner.config import SrdeConfig
        from srde.tuner.model import SrdeModel

        register_peft_method(name=NAME.lower(), config_cls=SrdeConfig, model_cls=SrdeModel)
    return peft_type
