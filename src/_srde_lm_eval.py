"""Makes `lm_eval --model srde` work in any environment that has srde, with no import of srde by the user.

lm-evaluation-harness 0.4.13 knows the models of its own table and offers no entry point. `_srde_lm_eval.pth`, installed
beside this file, makes every start of Python import it. So it imports nothing that a started Python has not, and does one
thing: once `lm_eval.models` has been imported, it puts a name and the place of its class into lm-eval's registry. srde and
torch load when lm-eval asks for the model.
"""

import sys

MODELS = "lm_eval.models"
TARGET = "srde.eval.lm_eval_model:SrdeLM"


class _Finder:
    """Lets `lm_eval.models` be found as always, and registers the model when it has run. It takes itself away before."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != MODELS:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Adds `srde` to lm-eval's registry of models."""
    registry = getattr(sys.modules.get("lm_eval.api.registry"), "model_registry", None)
    # Versions before 0.4.12 have none. Whoever uses such a one without srde must not notice this file.
    if registry is not None and "srde" not in registry:
        registry.register("srde", target=TARGET)


sys.meta_path.insert(0, _Finder())
