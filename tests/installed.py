"What `make test` runs with the installed wheel, outside of the repository: no file of it may be needed."
import importlib
import json
import pkgutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution, entry_points
from pathlib import Path
import tocsr

home = Path(tocsr.__file__).parent
assert home.is_relative_to(sysconfig.get_path("purelib")), f"imported {home}, not the wheel"
modules = [m.name for m in pkgutil.iter_modules(tocsr.__path__) if m.name != "_modidx"]
for name in modules: importlib.import_module(f"tocsr.{name}")
assert {"cli", "images", "pipeline", "store"} <= set(modules)
assert distribution("tocsr").version == tocsr.__version__
assert {e.name for e in entry_points(group="nbdev")} >= {"tocsr"}

from tocsr.images import load_photos
from tocsr.profiles import DataConfig
from tocsr.store import project_root
assert project_root() is None and len(load_photos(DataConfig())) > 0
assert (home/"data/benchmarks.json").is_file()

if (home/"weights/onestep").is_dir():
    import numpy as np
    from tocsr.pipeline import TOCSRPipeline
    assert TOCSRPipeline.from_pretrained()(np.zeros((8, 12, 3), np.uint8)).images[0].size == (48, 32)

tool = Path(sys.executable).with_name("tocsr")
found = json.loads(subprocess.run([tool, "doctor", "--json", "--seconds", "0.1"], check=True, capture_output=True, text=True).stdout)
assert found["metrics"]["psnry"] is None and found["speed"]["training_gflops"] > 0
outside = subprocess.run([tool, "reproduce"], capture_output=True, text=True)
assert outside.returncode == 1 and "clone it" in outside.stderr and "Traceback" not in outside.stderr, outside.stderr
print(f"tocsr {tocsr.__version__} installed: {len(modules)} modules, {len(found['photographs']['names'])} photographs")
