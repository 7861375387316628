"""wheel: what `make wheel` builds, as a target."""

_COMMAND = """
value() { sed -n "s/^STABLE_FTJAX_$$1 //p" bazel-out/stable-status.txt; }
commit=$$(value COMMIT) epoch=$$(value EPOCH) modified=$$(value MODIFIED)
$(execpath //third_party:wheel_builder) --source=. --output=$(RULEDIR) \
  --commit=$${commit:-unknown} --epoch=$${epoch:-315532800} $${modified:+--modified}
"""

def wheel(name, version, srcs):
    """Builds the wheel, the source archive, the bill of materials and SHA256SUMS.

    The commit and its date come from stable-status.txt, which status.sh writes; a new commit builds
    this target again and no other.

    Args:
      name: of the target.
      version: of ftjax; the files' names have it.
      srcs: the sources of ftjax.
    """
    native.genrule(
        name = name,
        srcs = srcs,
        outs = [
            "SHA256SUMS",
            "ftjax-%s-py3-none-any.whl" % version,
            "ftjax-%s.cdx.json" % version,
            "ftjax-%s.tar.gz" % version,
        ],
        cmd = _COMMAND,
        stamp = 1,
        tools = ["//third_party:wheel_builder"],
    )
