#!/usr/bin/env python3
"""Build the libaom of the closed loop: Debian's source of libaom 3.6.0 with the hook of this folder, as a shared library in the cache.

Run by `make encoder`; needs only the standard library. Prints the path of the library. A library in the cache that fits is kept as it is.
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSION, REVISION = "3.6.0", "1+deb12u2"
TARBALL, SHA256 = f"aom_{VERSION}.orig.tar.gz", "2ba213822cb1528b5558d6727125654e14d1b2d7505bd1fc8afa36c2e9e9f94a"
OWN = ("prune_mask.patch", "av1nb_hook.h", "av1nb_hook.c")  # the patch, and the files that it names
FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=1", "-DCONFIG_LIBYUV=0", "-DCONFIG_WEBM_IO=0", "-DENABLE_TESTS=0", "-DENABLE_DOCS=0",
         "-DENABLE_EXAMPLES=0", "-DENABLE_TOOLS=0", "-DGIT_EXECUTABLE=/nonexistent")
TOOLS = {"cmake": ("cmake",), "ninja or make": ("ninja", "make"), "nasm or yasm": ("nasm", "yasm"), "C compiler": ("cc",), "C++ compiler": ("c++",),
         "perl": ("perl",), "patch": ("patch",)}
PACKAGES = "cmake ninja-build nasm gcc g++ perl patch"


class BuildError(Exception):
    "What is wrong and what to do, in one sentence."


def sha256(*files): return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()


def key():
    "Hash of what decides how the library turns out: the files of this folder and the settings of the build."
    return hashlib.sha256(sha256(*(HERE / name for name in OWN)).encode() + " ".join(FLAGS).encode()).hexdigest()[:12]


def run(*command, what, **settings):
    "Run a program; its output is shown only if it fails. Whatever ends this script ends the program and its children too."
    with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True, **settings) as process:
        try: output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        tail = "\n".join(output.strip().splitlines()[-25:])
        raise BuildError(f"{what} failed (exit status {process.returncode}). Its last words:\n{tail}")
    return output


def source_entries(folder=Path("/etc/apt")):
    "Debian's entries of this system's apt as deb-src entries, in deb822 form."
    entries = []
    for file in sorted([*folder.glob("sources.list.d/*.sources")]):
        for stanza in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
            lines = [line for line in stanza.splitlines() if line.strip() and not line.startswith("#")]
            fields = {line.split(":", 1)[0].lower(): line for line in lines if ":" in line and not line[0].isspace()}
            if "debian" not in fields.get("uris", "") or "deb" not in fields.get("types", "").split() or "no" in fields.get("enabled", "").split(): continue
            entries.append("\n".join("Types: deb-src" if line == fields["types"] else line for line in lines))
    for file in [folder / "sources.list", *sorted(folder.glob("sources.list.d/*.list"))]:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            found = re.match(r"\s*deb\s+(?:\[(.*?)\]\s+)?(\S*debian\S*)\s+(\S+)\s+([^#]+)", line)
            if not found: continue
            options, uri, suite, components = found.groups()
            signed = re.search(r"signed-by=(\S+)", options or "")
            entries.append(f"Types: deb-src\nURIs: {uri}\nSuites: {suite}\nComponents: {components.strip()}" + (f"\nSigned-By: {signed[1]}" if signed else ""))
    return entries


def fetch(folder):
    "Let apt fetch and verify Debian's source package into a folder. The system's own lists and entries stay as they are."
    if not shutil.which("apt-get"):
        raise BuildError("The source of libaom comes from Debian by apt-get, which this system does not have: "
                         f"name a folder that holds {TARBALL} with make encoder SOURCE=/path/to/folder.")
    entries = source_entries()
    if not entries: raise BuildError(f"This system's apt has no entry for Debian: name a folder that holds {TARBALL} with make encoder SOURCE=/path/to/folder.")
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial", "parts"): (state / name).mkdir(parents=True)
    (state / "av1nb.sources").write_text("\n\n".join(entries) + "\n", encoding="utf-8")
    options = [f"-oDir::Etc::sourcelist={state / 'av1nb.sources'}", f"-oDir::Etc::sourceparts={state / 'parts'}", f"-oDir::State::lists={state / 'lists'}",
               f"-oDir::Cache={state / 'cache'}", "-oAcquire::Retries=2", "-oAcquire::http::Timeout=30", "-oAcquire::https::Timeout=30"]
    run("apt-get", "-q", *options, "update", what="apt-get update with Debian's source entries")
    known = re.findall(rf"^Version: ({re.escape(VERSION)}-\S+)$", run("apt-cache", *options, "showsrc", "aom", what="apt-cache showsrc aom"), re.M)
    versions = [v for v in (f"{VERSION}-{REVISION}", *sorted(set(known))) if v in known]  # any revision has the same upstream tarball
    if not versions: raise BuildError(f"Debian's archive does not offer the source of aom {VERSION} to this system: name a folder that holds {TARBALL} with SOURCE=.")
    run("apt-get", "-q", *options, "source", "--download-only", f"aom={versions[0]}", what=f"apt-get source aom={versions[0]}", cwd=folder)


def unpack(folder, target):
    "Check the tarball, unpack it and apply Debian's patches; the names of the archives used, with their hashes."
    tarball = folder / TARBALL
    if not tarball.is_file(): raise BuildError(f"{folder} does not hold {TARBALL}, the upstream tarball of Debian's source package aom {VERSION}.")
    if (found := sha256(tarball)) != SHA256: raise BuildError(f"{tarball} is not the libaom {VERSION} that the patch was made for: its sha256 is {found}, it must be {SHA256}.")
    used = {TARBALL: found}
    with tarfile.open(tarball) as archive: archive.extractall(target, filter="data")
    (tree,) = target.iterdir()
    for debian in sorted(folder.glob(f"aom_{VERSION}-*.debian.tar.xz"))[:1]:
        used[debian.name] = sha256(debian)
        with tarfile.open(debian) as archive: archive.extractall(tree, filter="data")
        for line in (tree / "debian/patches/series").read_text().splitlines():
            if name := line.split("#")[0].strip(): run("patch", "-p1", "-i", tree / "debian/patches" / name, what=f"Debian's patch {name}", cwd=tree)
    return tree, used


def hook_version(library):
    "Version of the hook in a library, asked in a process of its own."
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).av1nb_hook_version())"
    done = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def build(source, temporary):
    "Build in a temporary folder; the library and what it was made from."
    if missing := [what for what, names in TOOLS.items() if not any(map(shutil.which, names))]:
        raise BuildError(f"To build libaom these are missing: {', '.join(missing)}. On Debian: apt-get install {PACKAGES}")
    if source is None:
        (source := temporary / "source").mkdir()
        fetch(source)
    tree, used = unpack(source, temporary / "tree")
    for name in OWN[1:]: shutil.copy(HERE / name, tree / "av1/encoder" / name)
    run("patch", "-p1", "--fuzz=0", "-i", HERE / OWN[0], what=f"The patch {OWN[0]}", cwd=tree)
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    out = temporary / "build"
    run("cmake", "-S", tree, "-B", out, *generator, *FLAGS, what="cmake")
    run("cmake", "--build", out, "--target", "aom", "--parallel", os.cpu_count() or 1, what="The build of libaom")
    return next(f.resolve() for f in (out / "libaom.so", out / "libaom.dylib") if f.exists()), used


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help=f"folder that holds {TARBALL}; without it, apt-get fetches it from Debian")
    parser.add_argument("--cache", type=Path, default=os.environ.get("AV1NB_CACHE") or Path.home() / ".cache/av1nb", help="folder of the cache (AV1NB_CACHE)")
    parser.add_argument("--force", action="store_true", help="build although a library that fits is in the cache")
    options = parser.parse_args()
    folder = Path(options.cache) / f"libaom-{VERSION}-{key()}"
    library, record = folder / "libaom.so", folder / "build.json"
    if not options.force and library.is_file() and record.is_file() and json.loads(record.read_text()).get("sha256") == sha256(library) and hook_version(library):
        os.utime(record)  # the newest record is the one that av1nb takes
        print(f"{library} (in the cache)")
        return
    os.nice(19)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
        temporary = Path(temporary)
        print(f"Building libaom {VERSION} with the partition hook (a few minutes) ...", flush=True)
        built, used = build(options.source, temporary)
        version = hook_version(built)
        if version is None: raise BuildError(f"{built.name} was built, but does not load or has no hook.")
        (ready := temporary / "ready").mkdir()
        shutil.copy(built, ready / library.name)
        facts = dict(libaom=VERSION, hook=version, sha256=sha256(built), key=key(), sources=used, flags=FLAGS)
        (ready / record.name).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if folder.exists(): os.replace(folder, temporary / "old")
        os.replace(ready, folder)
    print(library)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("make encoder: ended before the library was built; the cache is as it was."))
    try: main()
    except KeyboardInterrupt: sys.exit("make encoder: interrupted; the cache is as it was.")
    except (BuildError, OSError, tarfile.TarError) as error: sys.exit(f"make encoder: {error}")
