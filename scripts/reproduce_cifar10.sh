#!/usr/bin/env bash
# The numbers of the README: every objective on CIFAR-10 with one encoder (patch 8, width 192, depth 6), one after the other.
#   bash scripts/reproduce_cifar10.sh CIFAR10 [RUNS]
# CIFAR10: folder with train/CLASS/*.{png,jpg} and test/CLASS/*; RUNS: where runs go, default runs/cifar10. Two CPU cores
# take about three hours. What is finished is not done again, and what was stopped goes on, so it can be started any time.
set -euo pipefail
cifar=${1:?"usage: bash scripts/reproduce_cifar10.sh CIFAR10 [RUNS]"}
here=$(cd "$(dirname "$0")/.." && pwd)
runs=${2:-runs/cifar10}
python=${PYTHON:-python}
for part in train test; do
    [ -d "$cifar/$part" ] || { echo "$cifar/$part: no such folder; give the one that holds train/ and test/" >&2; exit 2; }
done

train() { # NAME PIPELINE RECIPE [key=value ...]
    local name=$1 pipeline=$2 recipe=$3
    shift 3
    echo "== $name"
    "$python" "$here/pipelines/$pipeline.py" --config "$here/configs/pretrain/$recipe.yaml" \
        "data.train=folder:$cifar/train" "data.val=folder:$cifar/test" "run.dir=$runs/$name" "$@"
}

train mae pretrain_mae mae_vit_tiny_cifar10
train simmim pretrain_simmim simmim_vit_tiny_cifar10
train supervised train_supervised classification_vit_tiny_cifar10
train teacher train_supervised classification_resnet_cifar10
train deit train_deit deit_vit_tiny_cifar10 "objective.teacher.weights=$runs/teacher"
train tokenizer train_tokenizer tokenizer_vqkd_tiny_cifar10 "objective.teacher.weights=$runs/mae"
hash=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["sha256"])' "$runs/tokenizer/tokenizer/tokenizer.json")
train beit pretrain_beit beit_vit_tiny_cifar10 \
    "objective.tokenizer.path=$runs/tokenizer/tokenizer" "objective.tokenizer.sha256=$hash"
train ibot pretrain_ibot ibot_vit_tiny_cifar10

"$python" "$here/pipelines/compare.py" "$runs"/{mae,simmim,supervised,deit,beit,ibot} \
    measures=knn/top1,linear/top1,few_shot/top1 "out=$runs/comparison"
"$python" "$here/pipelines/compare.py" "$runs"/{tokenizer,beit,teacher,deit,supervised} "out=$runs/tokens_and_classes" \
    measures=codebook/cosine,codebook/usage,codebook/entropy,codebook/masked_accuracy,codebook/commonest,accuracy/top1
