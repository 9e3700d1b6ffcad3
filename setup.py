"""What pyproject.toml cannot say: compile the kernels into the wheel, and name the wheel after what is in it.

With a C++ compiler the wheel holds one library for each instruction set and is ``py3-none-<platform>``, good for every
Python; without one (or with CXX=false) it is ``py3-none-any``, and the torch twin does the work. The sources are in both.
An editable install compiles into the source tree.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("edge_runtime/kernels")


def compile_kernels(out: Path, *, ours: bool) -> None:
    """Compile into a folder, or say why that is not possible: an install goes on without. `ours`: nothing old may stay."""
    spec = importlib.util.spec_from_file_location("kernels_compile", Path(__file__).parent / KERNELS / "compile.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    try:
        for path in module.build(out):
            print(f"compiled {path}")
    except (module.CompileError, OSError) as error:
        for old in out.glob("*.so") if ours else ():
            old.unlink()
        print(f"warning: no compiled kernels, the torch twin will do their work: {error}", file=sys.stderr)


class BuildWithKernels(build_py):
    """Copies the packages and compiles the kernels beside them."""

    def run(self) -> None:
        """Compile last: what was copied may hold libraries of other sources."""
        super().run()
        here = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        compile_kernels(here / KERNELS / "native", ours=not self.editable_mode)


class WheelOfOnePlatform(bdist_wheel):
    """A wheel for one platform and every Python if it holds a library, for all platforms if not."""

    def run(self) -> None:
        """Build first, then look at what there is."""
        self.run_command("build")
        native = Path(self.get_finalized_command("build").build_lib) / KERNELS / "native"
        self.root_is_pure = not any(native.glob("*.so"))
        if not self.root_is_pure:
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """No Python's own interface is used."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfOnePlatform})
