# Makes the bench's table of what bench/run has collected: OUT.md, OUT.json, OUT.svg.
#
#   awk -f report.awk -v out=OUT -v systems="native tcg ..." ABOUT ROWS CLOCKS SAMPLES
#
# ABOUT: NAME=VALUE. The others with tabs: ROWS name, group, unit, what; CLOCKS system, speed of its clock against the
# host's; SAMPLES system, row, ok|skip|limit|failed, value (nanoseconds; KiB for memory, 1/s for mips) or reason, where
# an empty row means the whole system. Ratios are of medians. f is the file that put() writes to.

BEGIN { FS = "\t"; n_systems = split(systems, sysname, " ") }
FNR == 1 { file++ }
file == 1 {
    at = index($0, "=")
    about_name[++abouts] = substr($0, 1, at - 1); about[abouts] = substr($0, at + 1)
    next
}
file == 2 { row[++rows] = $1; group[$1] = $2; unit[$1] = $3; what[$1] = $4; next }
NF == 2 { clock_n[$1]++; clock_sum[$1] += $2; next }
$2 == "" { off[$1] = $4; next }
$3 == "ok" { value[$1, $2, ++count[$1, $2]] = $4 + 0; next }
{ reason[$1, $2] = $3 == "limit" ? "over " $4 " s" : $3 ": " $4 }

function median(s, r,    n, i, j, v, t)
{
    n = count[s, r]
    for (i = 1; i <= n; i++) {
        t = value[s, r, i]
        for (j = i - 1; j >= 1 && v[j] > t; j--)
            v[j + 1] = v[j]
        v[j + 1] = t
    }
    return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
}
function number(x) { return sprintf(x < 9.995 ? "%.2f" : x < 99.95 ? "%.1f" : "%.0f", x) }
function shown(r, x)
{
    if (unit[r] == "KiB" && r == "memory") return sprintf("%.1f MiB", x / 1024)
    if (r == "mips") return number(x)
    if (x < 1000) return number(x) " ns"
    if (x < 1e6) return number(x / 1e3) " us"
    if (x < 1e9) return number(x / 1e6) " ms"
    return number(x / 1e9) " s"
}
function ratio(s, base, r) { return has(s, r) && has(base, r) && r != "mips" ? median(s, r) / median(base, r) : 0 }
function has(s, r) { return (s, r) in med }
function escaped(x) { gsub(/\\/, "\\\\", x); gsub(/"/, "\\\"", x); gsub(/[\001-\037]/, " ", x); return "\"" x "\"" }
function markup(x) { gsub(/&/, "\\&amp;", x); gsub(/</, "\\&lt;", x); return x }
function title(s)
{
    return s == "tcg" ? "QEMU TCG" : s == "uml" ? "UML" : s == "native" ? s : "doppel " s
}
# Which ratios a system has: to native, and to TCG unless it is that.
function bases(s,    list)
{
    list = s == "native" ? "" : "native"
    if (s != "native" && s != "tcg" && in_table("tcg")) list = list " tcg"
    return list
}
function in_table(s,    i) { for (i = 1; i <= n_systems; i++) if (sysname[i] == s && !(s in off)) return 1; return 0 }
# Geometric mean of the ratios of a group, over the rows that have both.
function mean(s, base, g,    i, sum, n)
{
    for (i = 1; i <= rows; i++)
        if (group[row[i]] == g && ratio(s, base, row[i]) > 0) { sum += log(ratio(s, base, row[i])); n++ }
    return n ? number(exp(sum / n)) : ""
}

function markdown(    i, k, b, n, list, s, r, x, seen)
{
    f = out ".md"
    put("# Figures\n\nMade by `make bench`, all in one run, systems in turn in each round; medians.\n\n")
    for (i = 1; i <= abouts; i++)
        put("- " about_name[i] ": " about[i] "\n")
    put("\n| row | per |")
    for (i = 1; i <= n_systems; i++) {
        s = sysname[i]
        if (s in off) continue
        put(" " title(s) " |")
        n = split(bases(s), list, " ")
        for (b = 1; b <= n; b++) put(" / " (list[b] == "tcg" ? "TCG" : list[b]) " |")
    }
    put("\n|---|---|")
    for (i = 1; i <= n_systems; i++)
        if (!(sysname[i] in off))
            for (b = split(bases(sysname[i]), list, " "); b >= 0; b--) put("---:|")
    put("\n")
    for (k = 1; k <= rows; k++) {
        r = row[k]
        put("| " what[r] " (" r ") | " unit[r] " |")
        for (i = 1; i <= n_systems; i++) {
            s = sysname[i]
            if (s in off) continue
            put(" " (has(s, r) ? shown(r, median(s, r)) partly(s, r) : ((s, r) in reason) ? mark(s, r) : "") " |")
            n = split(bases(s), list, " ")
            for (b = 1; b <= n; b++) { x = ratio(s, list[b], r); put(" " (x ? number(x) : "") " |") }
        }
        put("\n")
    }
    for (k = 1; k <= rows; k++) {
        if (seen[group[row[k]]]++ || group[row[k]] == "machine") continue
        put("| **geometric mean, " group[row[k]] "** | |")
        for (i = 1; i <= n_systems; i++) {
            s = sysname[i]
            if (s in off) continue
            put(" |")
            n = split(bases(s), list, " ")
            for (b = 1; b <= n; b++) put(" " mean(s, list[b], group[row[k]]) " |")
        }
        put("\n")
    }
    put("\n")
    for (i = 1; i <= n_notes; i++)
        put("- (" i ") " note[i] "\n")
    for (i = 1; i <= n_systems; i++) {
        s = sysname[i]
        x = clock_n[s] ? clock_sum[s] / clock_n[s] : 1
        if (s in off)
            put("- " title(s) " was skipped: " off[s] "\n")
        else if (x > 1.02 || x < 0.98)
            put("- The clock of " title(s) " ran at " sprintf("%.3f", x) \
                " of the host's speed: its times are to be divided by that.\n")
    }
    close(f)
}
# The number of the note that says more; one note for each text.
function noted(text,    i)
{
    for (i = 1; i <= n_notes; i++)
        if (note[i] == text) break
    if (i > n_notes) note[++n_notes] = text
    return " (" i ")"
}
# For a row without a time: "over N s", "skipped" or "failed".
function mark(s, r,    text)
{
    text = reason[s, r]
    if (text ~ /^over /) return text
    return (text ~ /^skip/ ? "skipped" : "failed") noted(text)
}
# For a row that has a time, of rounds before one where there was none.
function partly(s, r)
{
    return ((s, r) in reason) ? noted("the median of fewer rounds; in one it was " reason[s, r]) : ""
}

function put(text) { printf "%s", text >f }
function json(    i, k, j, s, r, first)
{
    f = out ".json"
    put("{\n")
    for (i = 1; i <= abouts; i++)
        put("  " escaped(about_name[i]) ": " escaped(about[i]) ",\n")
    put("  \"skipped\": {")
    for (i = 1; i <= n_systems; i++)
        if (sysname[i] in off)
            put((first++ ? ", " : "") escaped(sysname[i]) ": " escaped(off[sysname[i]]))
    put("},\n  \"rows\": [\n")
    for (k = 1; k <= rows; k++) {
        r = row[k]
        put("    {\"name\": " escaped(r) ", \"group\": " escaped(group[r]) ", \"what\": " escaped(what[r]))
        put(", \"per\": " escaped(unit[r]) ", \"systems\": {")
        first = 0
        for (i = 1; i <= n_systems; i++) {
            s = sysname[i]
            if (!has(s, r) && !((s, r) in reason)) continue
            put((first++ ? "," : "") "\n      " escaped(s) ": ")
            if (!has(s, r)) { put("{\"none\": " escaped(reason[s, r]) "}"); continue }
            put(sprintf("{\"median\": %.3f", median(s, r)))
            if (ratio(s, "native", r)) put(sprintf(", \"to_native\": %.3f", ratio(s, "native", r)))
            if (ratio(s, "tcg", r)) put(sprintf(", \"to_tcg\": %.3f", ratio(s, "tcg", r)))
            put(", \"samples\": [")
            for (j = 1; j <= count[s, r]; j++) put((j > 1 ? ", " : "") sprintf("%.3f", value[s, r, j]))
            put("]}")
        }
        put("}}" (k < rows ? "," : "") "\n")
    }
    put("  ]\n}\n")
    close(f)
}

# Bars of the ratio to native, on a logarithmic scale from 0.5 on; as far to the right as the slowest.
function place(x) { return left + (log(x < 0.5 ? 0.5 : x) / log(10) - log(0.5) / log(10)) * decade }
function bar(x, y, width, height, fill, text)
{
    put(sprintf("<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\" fill=\"%s\">", x, y, width, height, fill))
    put((text == "" ? "" : "<title>" markup(text) "</title>") "</rect>\n")
}
function label(x, y, attributes, text)
{
    put(sprintf("<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, attributes, markup(text)))
}
function line(x, y, end, stroke)
{
    put(sprintf("<line x1=\"%.1f\" y1=\"%d\" x2=\"%.1f\" y2=\"%d\" stroke=\"%s\"/>\n", x, y, x, end, stroke))
}
function svg(    i, k, s, r, x, y, max, n, color, tick, height, shown_rows, drawn)
{
    f = out ".svg"
    split("#e0a030 #888888 #4477aa #aa3377 #228833 #66ccee #bb5566", color, " ")
    left = 250; max = 2
    for (i = 1; i <= n_systems; i++) {
        if (sysname[i] in off || sysname[i] == "native") continue
        drawn++
        for (k = 1; k <= rows; k++)
            if (ratio(sysname[i], "native", row[k]) > max) max = ratio(sysname[i], "native", row[k])
    }
    for (k = 1; k <= rows; k++) if (has("native", row[k])) shown_rows++
    decade = 620 / (log(max * 2) / log(10))
    height = 90 + shown_rows * (drawn * 7 + 6)
    put("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"920\" height=\"" height "\" font-family=\"sans-serif\"")
    put(" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n")
    label(10, 18, "font-size=\"14\"", "Time against native (1: as fast as the host), " about[1])
    x = left; n = 0
    for (i = 1; i <= n_systems; i++) {
        if (sysname[i] in off || sysname[i] == "native") continue
        bar(x, 28, 10, 10, color[n++ % 7 + 1], "")
        label(x + 14, 37, "", title(sysname[i]))
        x += 110
    }
    for (tick = 1; tick <= max; tick *= 10) {
        line(place(tick), 56, height - 14, tick == 1 ? "#000000" : "#cccccc")
        label(place(tick), 53, "text-anchor=\"middle\"", tick)
    }
    y = 62
    for (k = 1; k <= rows; k++) {
        r = row[k]
        if (!has("native", r)) continue
        label(left - 8, y + drawn * 3.5 + 4, "text-anchor=\"end\"", what[r])
        n = 0
        for (i = 1; i <= n_systems; i++) {
            s = sysname[i]
            if (s in off || s == "native") continue
            x = ratio(s, "native", r)
            n++
            if (x)
                bar(left, y, place(x) - left + 1, 6, color[(n - 1) % 7 + 1], title(s) ": " number(x))
            else if ((s, r) in reason)
                label(left + 2, y + 6, "font-size=\"7\"", title(s) ": " substr(reason[s, r], 1, 80))
            y += 7
        }
        y += 6
    }
    put("</svg>\n")
    close(f)
}

END {
    for (key in count) { split(key, part, SUBSEP); med[part[1], part[2]] = 1 }
    markdown()
    json()
    svg()
}
