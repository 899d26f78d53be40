# Completion in fish for the doit of virt-rt: doit completion fish | source

function __virt_rt_doit
    set -l root @ROOT@
    set -l python @PYTHON@
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    # another checkout's doit knows its own tasks
    if string match -q '*/*' -- $words[1]
        set -l own (string replace -r '/\.venv/bin/doit$' '' -- (realpath -s -- $words[1]))
        if test -f $own/pipeline/completion.py
            set root $own
        end
    end
    if test -x $root/.venv/bin/python
        set python $root/.venv/bin/python
    end
    for line in ($python -IS $root/pipeline/completion.py $words[2..] "$current" 2>/dev/null)
        switch $line
            case ':files'
                __fish_complete_path "$current"
            case ':directories'
                __fish_complete_directories "$current" ''
            case '*'
                echo $line
        end
    end
end
complete -c doit -f -a '(__virt_rt_doit)'
