# SPDX-License-Identifier: Apache-2.0
"""Maps the top-level folders into the import package ``phalanx``; everything else is in pyproject.toml.

``launch`` is also installed under its own name, as a package of one file that leads to ``phalanx.launch``, so that
``python -m launch.serve`` works as typed from any directory. The root package lives in ``package/``: a folder called ``phalanx`` in the checkout would shadow the mapping
whenever the checkout is the working directory.
"""

from setuptools import find_packages, setup

FOLDERS = ("runtime", "parallel", "kernels", "launch", "checkpoints")


def subpackages(folder: str) -> list[str]:
    """Dotted names of ``folder`` and the packages below it, relative to the repository root."""
    return [folder, *(f"{folder}.{name}" for name in find_packages(folder))]


packages = ["phalanx", "launch"]
package_dir = {"phalanx": "package", "launch": "tools/installed_launch"}
for folder in FOLDERS:
    for name in subpackages(folder):
        packages.append(f"phalanx.{name}")
        package_dir[f"phalanx.{name}"] = name.replace(".", "/")

# Folders of data only, which setuptools wants to be named as packages.
for name in ("kernels.include", "checkpoints.demo"):
    packages.append(f"phalanx.{name}")
    package_dir[f"phalanx.{name}"] = name.replace(".", "/")

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "phalanx": ["py.typed"],
        "phalanx.kernels": ["*.cu"],
        "phalanx.kernels.include": ["*.cuh"],
        "phalanx.checkpoints.demo": ["*"],
        "phalanx.runtime.server.web": ["page.html"],
    },
)
