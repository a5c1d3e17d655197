/* The one parser for options, and the values that they take (options.h). No state. */
#include "ctl/options.h"

#include <ctype.h>
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "base/trace.h"

#define GUESS_MAX 24

int parse_unsigned(const char *s, u64 *v)
{
    if (!isdigit((unsigned char)*s))
        return -EINVAL;
    errno = 0;
    char *end;
    unsigned long long n = strtoull(s, &end, 10);
    if (errno || *end)
        return -EINVAL;
    *v = n;
    return 0;
}

int parse_size(const char *s, u64 *bytes)
{
    static const char suffixes[] = "KMGT";
    if (!isdigit((unsigned char)*s))
        return -EINVAL;
    errno = 0;
    char *end;
    unsigned long long n = strtoull(s, &end, 10);
    if (errno)
        return -EINVAL;
    unsigned shift = 0;
    if (*end) {
        const char *p = strchr(suffixes, toupper((unsigned char)*end));
        if (!p || end[1])
            return -EINVAL;
        shift = 10 * (unsigned)(p - suffixes + 1);
    }
    if (n > (BIT(63) >> shift))
        return -EINVAL;
    *bytes = (u64)n << shift;
    return 0;
}

/* From the right, since the list has commas of its own. */
int parse_trace(char *spec, u32 *mask, const char **file)
{
    static const char key[] = "file=";
    char *found = NULL;
    for (char *p = spec; (p = strstr(p, key)); p++)
        if (p == spec || p[-1] == ',')
            found = p;
    *file = NULL;
    if (found) {
        *file = found + strlen(key);
        found[found == spec ? 0 : -1] = '\0';
        if (!**file)
            return err(-EINVAL, "--trace: no file behind \"file=\"; write --trace LIST,file=FILE");
    }
    if (!*spec)
        return err(-EINVAL, "--trace: no kind of event is named; write for example --trace exits,faults");
    return trace_parse(spec, mask);
}

/* Levenshtein's distance, for short words. */
static unsigned distance(const char *a, const char *b)
{
    unsigned row[GUESS_MAX + 1];
    size_t n = strlen(b);
    for (unsigned j = 0; j <= n; j++)
        row[j] = j;
    for (unsigned i = 1; *a; a++, i++) {
        unsigned diagonal = row[0];
        row[0] = i;
        for (unsigned j = 1; j <= n; j++) {
            unsigned up = row[j];
            unsigned best = MIN(up, row[j - 1]) + 1;
            row[j] = MIN(best, diagonal + (*a != b[j - 1]));
            diagonal = up;
        }
    }
    return row[n];
}

const char *options_guess(const char *word, const char *(*name)(const void *table, unsigned i), const void *table,
                          unsigned n)
{
    size_t len = strlen(word);
    unsigned best = 3;
    const char *guess = NULL;
    if (len < 2 || len > GUESS_MAX)
        return NULL;
    for (unsigned i = 0; i < n; i++) {
        const char *candidate = name(table, i);
        bool begins = !strncmp(candidate, word, len);
        unsigned d = begins ? 1 : distance(word, candidate);
        if (d < best && d < len) {
            best = d;
            guess = candidate;
        }
    }
    return guess;
}

static const char *option_name(const void *table, unsigned i)
{
    return ((const struct option *)table)[i].name;
}

static int unknown_option(const struct option *table, unsigned rows, const char *word, size_t len)
{
    char name[GUESS_MAX + 1] = "";
    if (len <= GUESS_MAX)
        memcpy(name, word, len);
    const char *guess = options_guess(name, option_name, table, rows);
    if (guess)
        return err(-EINVAL, "--%.*s: no such option; did you mean --%s?", (int)len, word, guess);
    return err(-EINVAL, "--%.*s: no such option", (int)MIN(len, 200), word);
}

/* The row of the option that word (without its dashes) names, or -EINVAL with err(). */
static int find_option(const struct option *table, unsigned rows, const char *word)
{
    size_t len = strcspn(word, "=");
    for (unsigned i = 0; i < rows; i++)
        if (strlen(table[i].name) == len && !memcmp(table[i].name, word, len))
            return (int)i;
    return unknown_option(table, rows, word, len);
}

static int find_letter(const struct option *table, unsigned rows, const char *word)
{
    for (unsigned i = 0; i < rows; i++)
        if (word[1] == table[i].name[0] && !word[2])
            return (int)i;
    return err(-EINVAL, "%.200s: no such option", word);
}

/*
 * Sets *value to what belongs to the option at argv[0], and returns how many words that takes, or -EINVAL with err().
 */
static int option_value(const struct option *o, int argc, char **argv, const char **value)
{
    const char *inlined = strchr(argv[0], '=');
    int used = 1;
    *value = NULL;
    if (!o->arg)
        return inlined ? err(-EINVAL, "--%s: takes no value; write just --%s", o->name, o->name) : used;
    if (option_optional(o) && !inlined)
        return used;
    if (inlined) {
        *value = inlined + 1;
    } else if (argc > 1) {
        *value = argv[1];
        used = 2;
    } else {
        return err(-EINVAL, "--%s: its value is missing; write --%s %s", o->name, o->name, o->arg);
    }
    if (!**value)
        return err(-EINVAL, "--%s: its value is empty; write --%s%s%s", o->name, o->name, option_optional(o) ? "" : " ", o->arg);
    return used;
}

/* Takes the option at argv[0]; returns how many words that takes, or -EINVAL with err(). given: a bit per row. */
static int option_take(const struct option *table, unsigned rows, void *target, int argc, char **argv, bool letters, u64 *given)
{
    const char *word = argv[0], *value;
    if (word[0] != '-' || !word[1])
        return err(-EINVAL, "\"%.200s\": not an option; a command for the guest stands behind \"--\"", word);
    if (word[1] != '-' && !letters)
        return err(-EINVAL, "%.200s: no such option; options begin with two dashes, and a command for the guest stands behind \"--\"", word);
    int row = word[1] == '-' ? find_option(table, rows, word + 2) : find_letter(table, rows, word);
    if (row < 0)
        return row;
    if ((*given & BIT(row)) && !table[row].many)
        return err(-EINVAL, "--%s: given twice; leave one out", table[row].name);
    *given |= BIT(row);
    int used = option_value(&table[row], argc, argv, &value);
    if (used < 0)
        return used;
    int r = table[row].set(target, value);
    return r < 0 ? r : used;
}

static int parse(const struct option *table, unsigned rows, void *target, int argc, char **argv, bool letters, int *words, char ***rest)
{
    bug_on(rows > OPTIONS_MAX);
    u64 given = 0;
    *rest = NULL;
    for (int i = 0; i < argc;) {
        if (!strcmp(argv[i], "--")) {
            *rest = argv + i + 1;
            break;
        }
        if (words && (argv[i][0] != '-' || !argv[i][1])) {
            argv[(*words)++] = argv[i++];
            continue;
        }
        int used = option_take(table, rows, target, argc - i, argv + i, letters, &given);
        if (used < 0)
            return used;
        i += used;
    }
    return 0;
}

int options_parse(const struct option *table, unsigned rows, void *target, int argc, char **argv, char ***rest)
{
    return parse(table, rows, target, argc, argv, false, NULL, rest);
}

static int parse_words(const struct option *table, unsigned rows, void *target, int argc, char **argv, bool letters, int *words, char ***rest)
{
    *words = 0;
    int r = parse(table, rows, target, argc, argv, letters, words, rest);
    if (r == 0 && *words && *words < argc)
        argv[*words] = NULL;
    return r;
}

int options_parse_words(const struct option *table, unsigned rows, void *target, int argc, char **argv, int *words, char ***rest)
{
    return parse_words(table, rows, target, argc, argv, true, words, rest);
}

int options_parse_plain_words(const struct option *table, unsigned rows, void *target, int argc, char **argv, int *words, char ***rest)
{
    return parse_words(table, rows, target, argc, argv, false, words, rest);
}
