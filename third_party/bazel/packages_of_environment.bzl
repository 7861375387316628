"""Stands in for the hub of pip packages on Bazel 4: @pypi//jax is an empty library there.

The interpreter is the one of the virtual environment that `make bazel` puts first on PATH, made
from the same lock with its hashes checked; it has the packages.
"""

def _packages_of_environment_impl(repository_ctx):
    for line in repository_ctx.read(repository_ctx.attr.lock).splitlines():
        name, separator, _ = line.partition("==")
        if separator and not name.startswith((" ", "#", "\t")):
            name = name.partition("[")[0].replace("-", "_").replace(".", "_").lower()
            repository_ctx.file(name + "/BUILD", _LIBRARY % name, executable = False)

_LIBRARY = """py_library(name = "%s", visibility = ["//visibility:public"])
"""

packages_of_environment = repository_rule(
    implementation = _packages_of_environment_impl,
    attrs = {"lock": attr.label(
        doc = "Requirements, one NAME==VERSION at the begin of a line.",
        mandatory = True,
    )},
    doc = "One package with an empty py_library for each line of a lock.",
)
