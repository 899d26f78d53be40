/*
 * Init of a machine in which a driver and its program are tried: runs the lines of /runs, and powers off.
 *
 *   insmod FILE         load a module
 *   write FILE WORD     write into a file
 *   wait MS             do nothing
 *   user COMMAND        run it as nobody
 *   later COMMAND       run it, and go on
 *   COMMAND             run it, its output on the console
 *
 * After each line the console has "run: STATUS LINE".
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int run(char **words, int user, int later)
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		if (user && (setgid(65534) || setuid(65534)))
			_exit(126);
		execv(words[0], words);
		_exit(127);
	}
	if (later)
		return 0;
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return 125;
	return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int obey(char *line)
{
	char *words[64];
	int count = 0, file;

	for (char *word = strtok(line, " "); word && count < 63; word = strtok(NULL, " "))
		words[count++] = word;
	words[count] = NULL;
	if (!strcmp(words[0], "insmod")) {
		file = open(words[1], O_RDONLY);
		return file < 0 || syscall(SYS_finit_module, file, "", 0) ? 1 : 0;
	}
	if (!strcmp(words[0], "write")) {
		file = open(words[1], O_WRONLY);
		return file < 0 || write(file, words[2], strlen(words[2])) < 0 ? 1 : 0;
	}
	if (!strcmp(words[0], "wait"))
		return usleep(1000 * atoi(words[1]));
	if (!strcmp(words[0], "user"))
		return run(words + 1, 1, 0);
	if (!strcmp(words[0], "later"))
		return run(words + 1, 0, 1);
	return run(words, 0, 0);
}

int main(void)
{
	char line[4096], copy[4096];
	FILE *runs = fopen("/runs", "r");

	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	while (runs && fgets(line, sizeof(line), runs)) {
		line[strcspn(line, "\n")] = '\0';
		strcpy(copy, line);
		if (*line)
			printf("run: %d %s\n", obey(copy), line);
		fflush(stdout);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
	puts("run: end");
	fflush(stdout);
	sync();
	reboot(RB_POWER_OFF);
	return 0;
}
