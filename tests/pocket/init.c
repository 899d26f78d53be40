/*
 * The only program of the pocket machine: says which kernel runs, shows /proc/config.gz as hexadecimal lines, powers
 * off. Needs no C library but the kernel's own nolibc.
 */
#include <nolibc.h>

int main(void)
{
	struct utsname name;
	unsigned char bytes[32];
	ssize_t count, i;
	int config;

	/* SYSLOG_ACTION_CONSOLE_OFF: a message of the kernel must not land in the middle of a line. */
	syscall(__NR_syslog, 6, NULL, 0);
	if (mount("proc", "/proc", "proc", 0, NULL) || uname(&name))
		perror("pocket");
	printf("pocket: release %s\n", name.release);
	printf("pocket: version %s\n", name.version);
	config = open("/proc/config.gz", O_RDONLY);
	while ((count = read(config, bytes, sizeof(bytes))) > 0) {
		printf("pocket: config ");
		for (i = 0; i < count; i++)
			printf("%x%x", bytes[i] >> 4, bytes[i] & 15);
		printf("\n");
	}
	printf("pocket: done\n");
	reboot(LINUX_REBOOT_CMD_POWER_OFF);
	return 1;
}
