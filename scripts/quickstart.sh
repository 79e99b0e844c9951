#!/usr/bin/env bash
# Enlarge, train, score and compare, on photographs that come with scikit-image, from nothing but Python:
#   bash scripts/quickstart.sh            about 2 to 4 minutes on 2 CPU cores, after the installation
#   bash scripts/quickstart.sh --short    about 1 minute
set -euo pipefail
source "$(dirname "$0")/environment.sh"
name=quickstart updates=1000 least=0.9
case "${1:-}" in
  "") ;;
  --short) name=quickstart_short updates=120 least=0 ;;
  *) echo "error: unknown option '$1'; known is --short" >&2; exit 2 ;;
esac
prepare_environment requirements.txt

results=results/$name
python scripts/demo_data.py --output data
echo "== 1 of 4: enlarge a photograph with this repository's weights"
python inference.py --model_path assets/weights/rcan_light_x4.pth.tar --input data/DemoTest/GT/chelsea.png --output $results/enlarged \
  --existing overwrite
echo "== 2 of 4: train a small RCAN x4, $updates updates"
python train.py --model_arch_name rcan_light_x4 --num_rg 2 --num_rcab 2 --exp_name $name \
  --train_sets DemoTrain --valid_sets DemoTest --lr_patch_size 24 --batch_size 8 --small_images skip \
  --optimizer muon --pointwise_upsampler True --luma_share 0.8 --initial_channel_gate 0.95 \
  --schedule cosine --learning_rate 2e-3 --warmup_updates 30 --clip_grad_norm 0.1 --ema_decay 0.99 \
  --epochs 1 --steps_per_epoch $updates --log_every 20 --eval_every $updates --save_every 200
echo "== 3 of 4: score it on photographs that it has not seen"
python test.py --model_path $results/best.pth.tar --test_sets DemoTest
echo "== 4 of 4: compare"
python scripts/figure.py --output $results/comparison.png --sr_name "this RCAN" \
  --gt data/DemoTest/GT/{astronaut,chelsea,coffee}.png --sr $results/test/DemoTest/{astronaut,chelsea,coffee}.png
echo
python - $results/test/metrics.json $least <<'END'
import json, sys

scores = json.load(open(sys.argv[1]))["DemoTest"]
gain = scores["psnr"] - scores["bicubic"]["psnr"]
print(f"Done. On three photographs that it has not seen, the network that you have just trained reaches {scores['psnr']:.2f} dB;")
print(f"bicubic reaches {scores['bicubic']['psnr']:.2f} dB: {gain:+.2f} dB.")
if gain < float(sys.argv[2]):
    sys.exit(f"error: {sys.argv[2]} dB more than bicubic were expected; please report this with results/*/log.jsonl")
END
echo "  enlarged $PWD/$results/enlarged/chelsea.png (from 451x300 to 1804x1200)"
echo "  compare  $PWD/$results/comparison.png"
echo "  weights  $PWD/$results/best.pth.tar"
echo "Next: your own images, python inference.py photo.jpg; your own training, edit config.py."
