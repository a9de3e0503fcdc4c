"""The command that installs what is missing, for this system."""

from __future__ import annotations

import os
import shutil

_PACKAGE_MANAGERS = {
    "apt-get": "apt-get install",
    "dnf": "dnf install",
    "zypper": "zypper install",
    "pacman": "pacman -S",
    "apk": "apk add",
}
_OF_THE_USER = {"brew": "brew install", "conda": "conda install -c conda-forge"}


def install_command(package: str) -> str:
    """How to install a system package: by the package manager at hand, else by conda's name."""
    for program, command in _PACKAGE_MANAGERS.items():
        if shutil.which(program):
            return f"{'' if os.geteuid() == 0 else 'sudo '}{command} {package}"
    for program, command in _OF_THE_USER.items():
        if shutil.which(program):
            return f"{command} {package}"
    return f"{_OF_THE_USER['conda']} {package}"
