#!/bin/bash
# Measures, on a machine with a GPU, the time from start to answer: all rows in under 8 minutes.
#
#   bash benchmarks/gpu_start.sh CAMVID VOC PHOTOS OUT [ROW...]
#
# CAMVID: CamVid in the layout of docs/own_data.md; VOC: a folder that holds VOCdevkit/; PHOTOS: any
# photos; OUT: folder for the results, start.jsonl among them. ROWs (default: all): camvid photos
# evaluate input resnet18 many busy. Each row starts with an empty cache of compiled programs,
# except "many" and "busy", which measure images per second. SPLIT (default: val) of VOC is evaluated.
# Needs torchvision, for a weights file, and all that TFDS imports.
set -u
camvid=$(realpath "$1") voc=$(realpath "$2") photos=$(realpath "$3") out=$(realpath -m "$4")
shift 4
rows=${*:-camvid photos evaluate input resnet18 many busy}
cd "$(dirname "$0")/.." || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TFDS_DATA_DIR="$scratch/tfds"
deeplab="python3 -m deeplab_jax.cli"
weights="$scratch/deeplabv3_resnet50.pth"

# row NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds and notes its time.
row() {
  local name=$1 limit=$2 begun seconds code
  shift 2
  begun=$(date +%s.%N)
  timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
  code=$?
  seconds=$(python3 -c "import sys, time; print(round(time.time() - float(sys.argv[1]), 2))" "$begun")
  echo "{\"name\": \"$name\", \"seconds\": $seconds, \"exit_code\": $code}" | tee -a "$out/start.jsonl"
  [ $code = 0 ] || tail -n 5 "$out/$name.txt"
}

fresh() { export JAX_COMPILATION_CACHE_DIR="$scratch/cache_$1"; }

make_weights() {
  [ -e "$weights" ] || python3 -c "
import sys, torch, torchvision
torch.manual_seed(0)
model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
torch.save(model.state_dict(), sys.argv[1])" "$weights"
}

for name in $rows; do
  fresh "$name"
  case $name in
    camvid)
      row camvid 110 python3 benchmarks/camvid.py --root "$camvid" --alone --steps 600 \
        --json "$out/camvid.json" ;;
    photos)
      make_weights
      row photos 60 $deeplab predict "$weights" "$photos" --out "$scratch/photos"
      row photos_again 60 $deeplab predict "$weights" "$photos" --out "$scratch/photos" ;;
    evaluate)
      make_weights  # a first evaluation prepares the data
      JAX_PLATFORMS=cpu $deeplab evaluate "$weights" --data voc --root "$voc" --limit 1 >/dev/null 2>&1
      row evaluate 80 $deeplab evaluate "$weights" --data voc --root "$voc" --split "${SPLIT:-val}" \
        --scales 0.75,1,1.25 --flip ;;
    input)
      row input 60 python3 benchmarks/input_pipeline.py --alone --workers 1 12 15 \
        --json "$out/input.json" ;;
    resnet18)
      row resnet18 90 python3 train.py --config configs/voc_os16.py --workdir "$scratch/resnet18" \
        --config.model.architecture=paper_resnet18 --config.init.backbone= \
        --config.data.root="$voc" --config.data.split=train --config.data.num_workers=12 \
        --config.train.steps=600 --config.train.log_every=100 --config.train.eval_every=0 \
        --config.train.save_every=0
      cp "$scratch/resnet18/metrics.jsonl" "$out/resnet18.jsonl" ;;
    many) # one image each; the difference of two runs leaves the start out
      make_weights
      mkdir -p "$scratch/many" "$scratch/few"
      for copy in 0 1 2 3 4 5 6; do
        for image in "$voc"/VOCdevkit/VOC2012/JPEGImages/*.jpg; do
          ln -s "$image" "$scratch/many/${copy}_$(basename "$image")"
        done
      done
      for image in $(ls "$scratch/many" | head -n 200); do
        cp -P "$scratch/many/$image" "$scratch/few/"
      done
      row few 60 $deeplab predict "$weights" "$scratch/few" --out "$scratch/out_few"
      row few_again 60 $deeplab predict "$weights" "$scratch/few" --out "$scratch/out_few"
      row many 90 $deeplab predict "$weights" "$scratch/many" --out "$scratch/out_many" ;;
    busy)
      make_weights
      fresh evaluate
      row busy 60 python3 -m benchmarks.device_busy "$weights" --root "$voc" --split "${SPLIT:-val}" ;;
    *) echo "unknown row $name" >&2; exit 2 ;;
  esac
done
