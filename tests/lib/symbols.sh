# For test scripts, sourced: symbols for gdb from a guest's own /proc/kallsyms (boot with nokaslr).
#
#   symbols_make KALLSYMS OUT     an ELF file: three sections without contents, and the symbols in them; leaves OUT.s, OUT.o
symbols_make()
{
    awk '
        function begin(name, flags) { printf ".section .%s,\"%s\",@nobits\n%s_base:\n.skip 0x1000000\n", name, flags, name }
        BEGIN { begin("ktext", "ax"); begin("kdata", "aw"); begin("kinit", "ax"); split("ktext kdata kinit", base) }
        $1 ~ /^ffffffff8[123]/ && $3 ~ /^[A-Za-z_][A-Za-z0-9_]*$/ && !seen[$3]++ {
            printf ".globl %s\n.type %s,@%s\n.set %s,%s_base+0x%s\n", $3, $3, tolower($2) == "t" ? "function" : "object",
                $3, base[substr($1, 10, 1)], substr($1, 11)
        }' "$1" >"$2.s"
    as -o "$2.o" "$2.s" && ld -e 0 --section-start=.ktext=0xffffffff81000000 \
        --section-start=.kdata=0xffffffff82000000 --section-start=.kinit=0xffffffff83000000 -o "$2" "$2.o"
}
