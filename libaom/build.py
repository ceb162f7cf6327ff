#!/usr/bin/env python3
"""Build the libaom of the closed loop: Debian's source of a release with the hook of this folder.

Run by `make encoder`; needs only the standard library. The shared library goes into the cache, and
its path is printed; a library in the cache that fits is kept as it is.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Release:
    "A release of libaom for which this folder has a patch."
    suite: str  # release of Debian whose archive has the source
    revision: str  # Debian's revision that is taken if it is there
    sha256: str  # of the upstream tarball, the same for all of Debian's revisions
    patch: str  # file in this folder


RELEASES = {
    "3.12.1": Release(
        "trixie", "1+deb13u1",
        "40c929a41b2a59c24319a699c358351422829b3ae646de31b18cbabed0191962",
        "prune_mask.patch"),
}
DEFAULT = "3.12.1"
HOOK = ("av1nb_hook.h", "av1nb_hook.c")  # the files that a patch names
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=1", "-DCONFIG_LIBYUV=0",
    "-DCONFIG_WEBM_IO=0", "-DENABLE_TESTS=0", "-DENABLE_DOCS=0", "-DENABLE_EXAMPLES=0",
    "-DENABLE_TOOLS=0", "-DGIT_EXECUTABLE=/nonexistent")
TOOLS = {
    "cmake": ("cmake",), "ninja or make": ("ninja", "make"), "nasm or yasm": ("nasm", "yasm"),
    "C compiler": ("cc",), "C++ compiler": ("c++",), "perl": ("perl",), "patch": ("patch",)}
PACKAGES = "cmake ninja-build nasm gcc g++ perl patch"


class BuildError(Exception):
    "What is wrong and what to do, in one sentence."


def tarball_of(version):
    "Name of a release's upstream tarball."
    return f"aom_{version}.orig.tar.gz"


def by_folder(version):
    "What to do where apt-get cannot help."
    return (
        f"name a folder that holds {tarball_of(version)} with make encoder "
        "SOURCE=/path/to/folder.")


def sha256(*files):
    "Hash of the content of files, one after the other."
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()


def key(version=DEFAULT):
    "Hash of what decides how the library turns out: patch, hook and the settings of the build."
    own = (RELEASES[version].patch, *HOOK)
    files = "".join(sha256(HERE / name) for name in own)
    return hashlib.sha256(files.encode() + " ".join(FLAGS).encode()).hexdigest()[:12]


def run(*command, what, **settings):
    """Run a program; its output is shown only if it fails.

    Whatever ends this script ends the program and its children too.
    """
    with subprocess.Popen(
            [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, **settings) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        tail = "\n".join(output.strip().splitlines()[-25:])
        raise BuildError(
            f"{what} failed (exit status {process.returncode}). Its last words:\n{tail}")
    return output


def debian_archives(folder=Path("/etc/apt")):
    "Addresses of Debian's main archive in this system's apt, each with the keyring named for it."
    archives = {}
    for file in sorted(folder.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
            fields = stanza_fields(stanza)
            if "deb" not in fields.get("types", "").split() or fields.get("enabled") == "no":
                continue
            for address in fields.get("uris", "").split():
                archives.setdefault(address, fields.get("signed-by"))
    for file in [folder / "sources.list", *sorted(folder.glob("sources.list.d/*.list"))]:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            if found := re.match(r"\s*deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+\S+\s+[^#]+", line):
                signed = re.search(r"signed-by=(\S+)", found[1] or "")
                archives.setdefault(found[2], signed[1] if signed else None)
    return {a: k for a, k in archives.items() if re.search(r"/debian(/|/\d{8}T\d{6}Z/?)?$", a)}


def stanza_fields(stanza):
    "Fields of a deb822 stanza by their names in small letters; comments are left out."
    fields, name = {}, None
    for line in stanza.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if not line[0].isspace():
            name, _, line = line.partition(":")
            name = name.lower()
        fields[name] = f"{fields[name]}\n {line.strip()}" if name in fields else line.strip()
    return fields


def source_entries(suite, folder=Path("/etc/apt")):
    """Entries in deb822 form for the sources of one of Debian's releases.

    They name the archives that this system knows, whatever release the system itself is.
    """
    entries = []
    for address, keyring in debian_archives(folder).items():
        entry = f"Types: deb-src\nURIs: {address}\nSuites: {suite}\nComponents: main"
        entries.append(entry + (f"\nSigned-By: {keyring}" if keyring else ""))
    return entries


def fetch(folder, version=DEFAULT):
    """Let apt fetch and verify Debian's source package into a folder.

    The system's own lists and entries stay as they are.
    """
    release = RELEASES[version]
    if not shutil.which("apt-get"):
        raise BuildError(
            "The source of libaom comes from Debian by apt-get, which this system does not have: "
            f"{by_folder(version)}")
    entries = source_entries(release.suite)
    if not entries:
        raise BuildError(
            f"This system's apt has no entry for Debian's archive: {by_folder(version)}")
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (state / name).mkdir(parents=True)
    (state / "av1nb.sources").write_text("\n\n".join(entries) + "\n", encoding="utf-8")
    options = [
        f"-oDir::Etc::sourcelist={state / 'av1nb.sources'}",
        f"-oDir::Etc::sourceparts={state / 'parts'}", f"-oDir::State::lists={state / 'lists'}",
        f"-oDir::Cache={state / 'cache'}", "-oAcquire::Retries=2", "-oAcquire::http::Timeout=30",
        "-oAcquire::https::Timeout=30"]
    what = f"apt-get update with the source entries of Debian {release.suite}"
    try:
        run("apt-get", "-q", *options, "update", what=what)
    except BuildError as error:
        if "NO_PUBKEY" not in str(error) and "is not signed" not in str(error):
            raise
        raise BuildError(
            f"This system's apt cannot verify Debian {release.suite}: install a newer "
            f"debian-archive-keyring, or {by_folder(version)}") from error
    offered = run(
        "apt-cache", *options, "showsrc", "aom", what="apt-cache showsrc aom")
    known = set(re.findall(rf"^Version: ({re.escape(version)}-\S+)$", offered, re.M))
    wanted = f"{version}-{release.revision}"
    if not known:
        raise BuildError(
            f"Debian's archive does not offer the source of aom {version} to this system: "
            f"{by_folder(version)}")
    chosen = wanted if wanted in known else max(known)
    # The description of the package (.dsc) is not needed: apt verifies the two archives by the
    # hashes in its signed list.
    for part in ("--tar-only", "--diff-only"):
        run(
            "apt-get", "-q", *options, "source", "--download-only", part, f"aom={chosen}",
            what=f"apt-get source aom={chosen}", cwd=folder)


def unpack(folder, target, version=DEFAULT):
    "Check the tarball, unpack it, apply Debian's patches; the tree, and the hashes of what it is."
    tarball = folder / tarball_of(version)
    if not tarball.is_file():
        raise BuildError(
            f"{folder} does not hold {tarball.name}, the upstream tarball of Debian's source "
            f"package aom {version}.")
    found, wanted = sha256(tarball), RELEASES[version].sha256
    if found != wanted:
        raise BuildError(
            f"{tarball} is not the libaom {version} that the patch was made for: its sha256 is "
            f"{found}, it must be {wanted}.")
    used = {tarball.name: found}
    with tarfile.open(tarball) as archive:
        archive.extractall(target, filter="data")
    (tree,) = target.iterdir()
    for debian in sorted(folder.glob(f"aom_{version}-*.debian.tar.xz"))[:1]:
        used[debian.name] = sha256(debian)
        with tarfile.open(debian) as archive:
            archive.extractall(tree, filter="data")
        patches = tree / "debian/patches"
        for line in (patches / "series").read_text().splitlines():
            if name := line.split("#")[0].strip():
                what = f"Debian's patch {name}"
                run("patch", "-p1", "-i", patches / name, what=what, cwd=tree)
    return tree, used


def hook_version(library):
    "Version of the hook in a library, 0 without one, asked in a process of its own; None: broken."
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.aom_codec_version(); "
        "print(getattr(library, 'av1nb_hook_version', int)())")
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def build(source, temporary, version=DEFAULT, stock=False):
    "Build in a temporary folder; the library and what it was made from."
    missing = [what for what, names in TOOLS.items() if not any(map(shutil.which, names))]
    if missing:
        raise BuildError(
            f"To build libaom these are missing: {', '.join(missing)}. "
            f"On Debian: apt-get install {PACKAGES}")
    if source is None:
        source = temporary / "source"
        source.mkdir()
        fetch(source, version)
    tree, used = unpack(source, temporary / "tree", version)
    if not stock:
        for name in HOOK:
            shutil.copy(HERE / name, tree / "av1/encoder" / name)
        patch = RELEASES[version].patch
        run("patch", "-p1", "--fuzz=0", "-i", HERE / patch, what=f"The patch {patch}", cwd=tree)
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    out = temporary / "build"
    run("cmake", "-S", tree, "-B", out, *generator, *FLAGS, what="cmake")
    run(
        "cmake", "--build", out, "--target", "aom", "--parallel", os.cpu_count() or 1,
        what="The build of libaom")
    names = (out / "libaom.so", out / "libaom.dylib")
    return next(f.resolve() for f in names if f.exists()), used


def fits(library, record, stock):
    "Is this a finished library whose file is the one that was built?"
    if not library.is_file() or not record.is_file():
        return False
    try:
        recorded = json.loads(record.read_text()).get("sha256")
    except ValueError:
        return False
    return recorded == sha256(library) and is_usable(hook_version(library), stock)


def is_usable(hook, stock):
    "Does the library load, and has it a hook just if it must have one?"
    return hook is not None and (hook == 0) == stock


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--version", default=DEFAULT, choices=RELEASES, help=f"release of libaom ({DEFAULT})")
    parser.add_argument(
        "--source", type=Path, help="folder that holds the upstream tarball of the release "
        "(aom_….orig.tar.gz); without it, apt-get fetches it from Debian")
    parser.add_argument(
        "--cache", type=Path, default=os.environ.get("AV1NB_CACHE") or Path.home() / ".cache/av1nb",
        help="folder of the cache (AV1NB_CACHE)")
    parser.add_argument(
        "--force", action="store_true", help="build although a library that fits is in the cache")
    parser.add_argument(
        "--stock", action="store_true",
        help="build it the same way without the hook, to compare with")
    options = parser.parse_args()
    version = options.version
    stock = options.stock
    name = f"stock-{version}" if stock else f"libaom-{version}-{key(version)}"
    folder = Path(options.cache) / name
    library, record = folder / "libaom.so", folder / "build.json"
    if not options.force and fits(library, record, stock):
        os.utime(record)
        print(f"{library} (in the cache)")
        return
    os.nice(19)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
        temporary = Path(temporary)
        kind = "without" if stock else "with"
        print(
            f"Building libaom {version} {kind} the partition hook (a few minutes) ...", flush=True)
        built, used = build(options.source, temporary, version, stock)
        hook = hook_version(built)
        if not is_usable(hook, stock):
            raise BuildError(
                f"{built.name} was built, but does not load or is not {kind} the hook.")
        ready = temporary / "ready"
        ready.mkdir()
        shutil.copy(built, ready / library.name)
        facts = dict(
            libaom=version, hook=hook, sha256=sha256(built),
            key=None if stock else key(version), sources=used, flags=FLAGS)
        fresh = ready / record.name
        fresh.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, temporary / "old")
        os.replace(ready, folder)
    print(library)


if __name__ == "__main__":
    ended = "make encoder: ended before the library was built; the cache is as it was."
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ended))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("make encoder: interrupted; the cache is as it was.")
    except (BuildError, OSError, tarfile.TarError) as error:
        sys.exit(f"make encoder: {error}")
