# Completion in bash for the doit of virt-rt: source <(doit completion bash)
# shellcheck shell=bash

_virt_rt_doit() {
  local root=@ROOT@ python=@PYTHON@ line=${COMP_LINE:0:COMP_POINT}
  local current value _ beside=''
  local -a words
  # bash takes colons and equals signs for ends of words; a task's name has colons
  read -ra words <<<"$line"
  [[ $line == *[[:space:]] ]] && words+=('')
  current=${words[-1]}
  # another checkout's doit knows its own tasks
  if [[ ${words[0]} == */.venv/bin/doit && -f ${words[0]%/.venv/bin/doit}/pipeline/completion.py ]]; then
    root=${words[0]%/.venv/bin/doit}
  elif [[ ${words[0]} == .venv/bin/doit && -f pipeline/completion.py ]]; then
    root=$PWD
  fi
  [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
  # only what follows the last of these is replaced
  [[ $current == *[:=]* ]] && beside=${current%"${current##*[:=]}"}
  COMPREPLY=()
  while IFS=$'\t' read -r value _; do
    case $value in
      :files | :directories)
        compopt -o filenames
        mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -"${value:1:1}" -- "$current")
        ;;
      *) COMPREPLY+=("${value#"$beside"}") ;;
    esac
  done < <("$python" -IS "$root/pipeline/completion.py" "${words[@]:1}" 2>/dev/null)
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -F _virt_rt_doit doit
