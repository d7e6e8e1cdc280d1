"""PEFT knows the method once srde and peft are both imported: in any order, once, and without srde importing torch."""

import json
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import srde
from srde.tuner import SrdeConfig, SrdeModel, register_srde

KNOWN = "assert peft.PeftType('SRDE') in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING"
ORDERS = {
    "srde, then peft": f"import srde, peft; {KNOWN}",
    "peft, then srde": f"import peft, srde; {KNOWN}",
    "srde alone": "import srde, sys; assert 'peft' not in sys.modules",
    "a name of srde": "from srde import SrdeConfig; SrdeConfig()",
    "srde, then a part of peft": f"import srde; from peft.tuners import lora; import peft; {KNOWN}",
    "no peft at all": "import sys; sys.modules['peft'] = None; import srde; assert srde.__version__",
    "a room of srde": f"import srde.tuner.layer, peft; {KNOWN}",
}

# Each order runs in a child that has not imported peft; what peft itself imports is loaded already, to save time.
PROGRAM = """
import json, os, sys, traceback
import peft
for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
    del sys.modules[name]
failed = {}
for order, program in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        try:
            exec(program, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        failed[order] = status
print(json.dumps(failed))
"""


@pytest.mark.slow
def test_every_order_of_imports_registers_the_method():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(ORDERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}, done.stderr


def test_importing_srde_imports_neither_torch_nor_peft():
    program = (
        "import srde, sys; dir(srde); print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_type_is_a_real_member_of_the_enum():
    member = register_srde()
    assert member is PeftType.SRDE is PeftType("SRDE") is PeftType["SRDE"]
    assert isinstance(member, PeftType) and member == "SRDE" and member in list(PeftType)
    assert (
        PEFT_TYPE_TO_CONFIG_MAPPING[member] is SrdeConfig and PEFT_TYPE_TO_TUNER_MAPPING[member] is SrdeModel
    )


def test_registering_again_changes_nothing():
    before = list(PeftType)
    assert register_srde() is register_srde()
    assert list(PeftType) == before


def test_the_public_names():
    names = {
        "LearnedSparseSelector",
        "Routing",
        "RoutingRecord",
        "SaRDinEConfig",
        "SaRDinEForCausalLM",
        "SrdeConfig",
        "SrdeModel",
        "__version__",
        "calibrate_masks",
    }
    assert set(srde.__all__) == names <= set(dir(srde))
    assert all(getattr(srde, name) is not None for name in names)
    with pytest.raises(AttributeError, match="module 'srde' has no attribute 'SrdeConfigs'"):
        _ = srde.SrdeConfigs
