/*
 * Says what a kernel's own kconfig makes of configurations, without parsing the tree anew for each.
 *
 * Links with the kernel's own kconfig objects and runs in the environment of its make rules. argv: the last argument is
 * the top Kconfig file. First it prints the name of each yes-or-no symbol that can be asked for by itself, a line each, and
 * an empty line. Then each line of standard input, "IN OUT", is two paths: the configuration in IN, completed, goes to
 * OUT, and a line with 0 follows, or one with something else when that failed.
 */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "lkc.h"

/* What allnoconfig sets to n when it is not asked for: members of choices it leaves alone. */
static bool is_closed(struct menu *menu)
{
	struct symbol *sym = menu->sym;

	return sym && sym->name && menu->prompt && (sym->type == S_BOOLEAN || sym->type == S_TRISTATE) &&
	       !sym_is_choice(sym) && !sym_is_choice_value(sym);
}

static void print_closed(struct menu *menu)
{
	for (; menu; menu = menu->next) {
		if (is_closed(menu))
			puts(menu->sym->name);
		print_closed(menu->list);
	}
}

int main(int argc, char **argv)
{
	char line[4096];

	if (argc < 2)
		return 2;
	conf_parse(argv[argc - 1]);
	conf_set_message_callback(NULL);
	print_closed(rootmenu.list);
	puts("");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		char *in = strtok(line, " \n"), *out = strtok(NULL, " \n");

		printf("%d\n", in && out ? conf_read(in) || conf_write(out) : 2);
		fflush(stdout);
	}
	return 0;
}
