/*
 * Says why kconfig does not grant a symbol the value that was asked for.
 *
 * Links with the kernel's own kconfig objects and runs in the environment of its make rules, so it understands every
 * Kconfig language of its tree. argv: the last argument is the top Kconfig file; WHY_SYMBOLS names a file of lines
 * "SYMBOL=wanted". Output, one line a finding: "SYMBOL<tab>text".
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lkc.h"

/* The conjuncts of E below WANTED, each as kconfig writes it, with the present values of its symbols. */
static void print_unmet(const char *name, const char *label, struct expr *e, tristate wanted)
{
	struct gstr text;

	if (!e || expr_calc_value(e) >= wanted)
		return;
	if (e->type == E_AND) {
		print_unmet(name, label, e->left.expr, wanted);
		print_unmet(name, label, e->right.expr, wanted);
		return;
	}
	text = str_new();
	expr_gstr_print(e, &text);
	printf("%s\t%s%s\n", name, label, str_get(&text));
	str_free(&text);
}

/* The alternatives of E above WANTED: who holds a symbol up. */
static void print_holders(const char *name, struct expr *e, tristate wanted)
{
	struct gstr text;

	if (!e || expr_calc_value(e) <= wanted)
		return;
	if (e->type == E_OR) {
		print_holders(name, e->left.expr, wanted);
		print_holders(name, e->right.expr, wanted);
		return;
	}
	text = str_new();
	expr_gstr_print(e, &text);
	printf("%s\tselected by %s\n", name, str_get(&text));
	str_free(&text);
}

/* What holds a symbol that could be set: the member of its choice that is on, or its range. */
static void print_limits(const char *name, struct symbol *sym, struct property *prompt)
{
	struct property *range = sym_get_range_prop(sym);
	struct menu *member;

	if (range)
		printf("%s\tits range is %s to %s\n", name, sym_get_string_value(range->expr->left.sym),
		       sym_get_string_value(range->expr->right.sym));
	if (!sym_is_choice_value(sym) || !prompt->menu->parent)
		return;
	for (member = prompt->menu->parent->list; member; member = member->next)
		if (member->sym && member->sym != sym && sym_get_tristate_value(member->sym) == yes)
			printf("%s\tthe choice it belongs to is %s [=y]\n", name, member->sym->name);
}

static void explain(const char *name, const char *value)
{
	tristate wanted = !strcmp(value, "n") ? no : !strcmp(value, "m") ? mod : yes;
	struct symbol *sym = sym_find(name);
	struct property *prop, *prompt = NULL;
	struct gstr text;

	if (!sym || sym->type == S_UNKNOWN) {
		printf("%s\tthis kernel has no such symbol: renamed, removed or misspelt\n", name);
		return;
	}
	sym_calc_value(sym);
	if ((sym->type == S_BOOLEAN || sym->type == S_TRISTATE) && sym_get_tristate_value(sym) > wanted) {
		print_holders(name, sym->rev_dep.expr, wanted);
		return;
	}
	for (prop = sym->prop; prop; prop = prop->next) {
		if (prop->type != P_PROMPT)
			continue;
		prompt = prop;
		print_unmet(name, "depends on ", prop->visible.expr, wanted);
	}
	if (prompt) {
		print_limits(name, sym, prompt);
		return;
	}
	printf("%s\tcannot be asked for: it has no prompt and follows other symbols\n", name);
	print_unmet(name, "depends on ", sym->dir_dep.expr, wanted);
	if (sym->rev_dep.expr) {
		text = str_new();
		expr_gstr_print(sym->rev_dep.expr, &text);
		printf("%s\tselected by %s\n", name, str_get(&text));
		str_free(&text);
	}
}

int main(int argc, char **argv)
{
	const char *path = getenv("WHY_SYMBOLS");
	FILE *list = path ? fopen(path, "r") : NULL;
	char line[1024];

	if (argc < 2 || !list) {
		fprintf(stderr, "usage: WHY_SYMBOLS=FILE %s Kconfig\n", argv[0]);
		return 2;
	}
	conf_parse(argv[argc - 1]);
	conf_read(NULL);
	while (fgets(line, sizeof(line), list)) {
		char *value = strchr(line, '=');

		line[strcspn(line, "\n")] = '\0';
		if (!value)
			continue;
		*value++ = '\0';
		explain(line, value);
	}
	return fclose(list) || fflush(stdout) ? 1 : 0;
}
