import json
import subprocess
import sys

SCRIPT = """
import json, sys, time
started = time.perf_counter()
import memfilter
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "heavy": sorted({"torch", "numpy", "diffusers", "accelerate"} & set(sys.modules)),
                  "dir": dir(memfilter)}))
"""


def fresh_import() -> dict:
    return json.loads(subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True).stdout)


def test_importing_the_package_imports_no_torch_and_is_instant():
    runs = [fresh_import() for _ in range(3)]
    assert runs[0]["heavy"] == []
    assert min(run["seconds"] for run in runs) < 0.1


def test_public_names_are_listed_before_they_are_loaded_and_resolve():
    import memfilter

    names = {"MemFilter", "FilteredUNet", "FilterStats", "text_norm", "keep_mask", "masked_loss"}
    assert names <= set(fresh_import()["dir"])
    assert all(callable(getattr(memfilter, name)) for name in names)


def test_unknown_name_is_an_attribute_error():
    import memfilter

    assert not hasattr(memfilter, "MemoryFilter")
