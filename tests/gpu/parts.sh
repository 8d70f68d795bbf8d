#!/usr/bin/env bash
# Takes files and directories apart to bring them to a machine that receives small files alone, and
# puts them together there.
#
#   tests/gpu/parts.sh split OUT FILE…     parts of at most PART_MB (60) megabytes, and their hashes
#   tests/gpu/parts.sh join IN OUT         the files again, every hash compared
set -euo pipefail
usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 3 ] || usage
megabytes=${PART_MB:-60}

case $1 in
  split)
    out=$2
    shift 2
    mkdir -p "$out"
    for file in "$@"; do
      name=$(basename "$file")
      # A directory travels as an archive in a fixed order, so that its hash is its content's.
      [ -d "$file" ] && name=$name.tar
      if [ -d "$file" ]; then
        tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner \
          -C "$(dirname "$file")" -cf - "$(basename "$file")"
      else
        cat "$file"
      fi | tee >(sha256sum | sed "s|-\$|$name|" >"$out/$name.sha256") |
        split -b "${megabytes}000000" -d -a 3 - "$out/$name.part-"
    done
    # The hash is written beside the pipeline.
    wait
    (cd "$out" && sha256sum -- *.part-* >PARTS.sha256)
    ls -l "$out"
    ;;
  join)
    in=$(realpath "$2")
    out=$3
    (cd "$in" && sha256sum --check --quiet PARTS.sha256)
    mkdir -p "$out"
    cd "$out"
    for hash in "$in"/*.sha256; do
      name=$(basename "$hash" .sha256)
      [ "$name" = PARTS ] && continue
      cat "$in/$name".part-* >"$name"
      sha256sum --check --quiet "$hash"
      case $name in
        *.tar) tar -xf "$name" && rm "$name" ;;
        skipgpt-export) chmod +x "$name" ;;
      esac
    done
    ls -l
    ;;
  *) usage ;;
esac
