#compdef doit
# Completion in zsh for the doit of virt-rt: source <(doit completion zsh), after compinit

_virt_rt_doit() {
  local root=@ROOT@ python=@PYTHON@ line value what paths=''
  local -a names shown open openshown
  # another checkout's doit knows its own tasks
  local own=${${words[1]:a}%/.venv/bin/doit}
  if [[ $words[1] == */* && -f $own/pipeline/completion.py ]]; then
    root=$own
  fi
  [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
  while IFS= read -r line; do
    value=${line%%$'\t'*} what=${line#*$'\t'}
    case $value in
      :files | :directories) paths=$value ;;
      *=) open+=("$value") openshown+=("$value  -- $what") ;;
      *) names+=("$value") shown+=("$value  -- $what") ;;
    esac
  done < <("$python" -IS "$root/pipeline/completion.py" "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)
  (($#names)) && compadd -l -d shown -a names
  (($#open)) && compadd -l -S '' -d openshown -a open
  case $paths in
    :files) _files ;;
    :directories) _files -/ ;;
  esac
}
compdef _virt_rt_doit doit
