"""A tox plugin, which tox loads by this file's name: skip where no CPU build of torch is at hand.

Without it such an environment would count as failed. An environment with `system_site_packages`
takes the system's own torch, or is skipped. Which other builds are at hand is pip's to say:
PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS may add some.
"""

from tox.execute.request import StdinSource
from tox.plugin import impl
from tox.tox_env.errors import Skip


@impl
def tox_on_install(tox_env, arguments, section, of_type):
    """Look for torch, before the dependencies go in: pip is asked, and installs nothing.

    tox_env : tox.tox_env.api.ToxEnv, the environment that is being made
    arguments : tox.tox_env.python.pip.req_file.PythonDeps when of_type is "deps"
    section : str, what the installation belongs to; not needed here
    of_type : str, "deps" for the environment's own dependencies

    Raises tox's Skip, which tox reports, when there is none for this Python.
    """
    if of_type != "deps":
        return
    if tox_env.conf["system_site_packages"]:
        search = ["python", "-c", "import torch"]
        if tox_env.execute(search, stdin=StdinSource.OFF, show=False, run_id="torch").exit_code:
            raise Skip("the system's own Python has no PyTorch")
        return
    pins = [line for line in arguments.lines() if line.startswith("torch==")]
    if not pins:
        return
    search = ["python", "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", *pins]
    found = tox_env.execute(search, stdin=StdinSource.OFF, show=False, run_id="torch")
    if found.exit_code:
        python = tox_env.env_site_package_dir().parent.name
        raise Skip(f"there is no build of {pins[0]} for {python} at hand")
