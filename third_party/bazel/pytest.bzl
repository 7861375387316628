"""pytest_test: a file of tests, run by pytest."""

load("@rules_python//python:defs.bzl", "py_test")

def pytest_test(name, src, size, deps = [], data = [], shard_count = None, tags = []):
    """Runs pytest on one file, in a copy of what the target declares (run_pytest.py).

    Args:
      name: of the target.
      src: the file of tests.
      size: small, medium, large or enormous; Bazel's limit of time hangs on it.
      deps: libraries of what it imports.
      data: files that it reads.
      shard_count: in how many parts Bazel may run it at once.
      tags: of the target.
    """
    py_test(
        name = name,
        size = size,
        srcs = [
            src,
            "//third_party/bazel:run_pytest.py",
        ],
        args = ["$(rootpath %s)" % src],
        data = data + ["//:pyproject.toml"],
        legacy_create_init = 0,
        main = "//third_party/bazel:run_pytest.py",
        shard_count = shard_count,
        tags = tags,
        deps = deps + [
            "//tests:conftest",
            "@pypi//pytest",
        ],
    )
