// SPDX-License-Identifier: GPL-2.0-only
/*
 * Measures how long a device's interrupt takes: from the register write that raises it to the driver's hard handler,
 * and to a real-time thread in user space that waits for it.
 *
 * One thread, pinned to the measured CPU with a SCHED_FIFO priority and locked memory, waits; another one, on a
 * housekeeping CPU, raises. The times are the kernel's CLOCK_MONOTONIC, of which the raising one is only paced by
 * timers: without high-resolution timers samples come more slowly, and are as exact.
 *
 * Exit status: 0 all was measured; 1 interrupts were lost, came on another CPU, or the run was interrupted; 2 it could
 * not be measured, with a line that says why.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "irqlat.h"

#define SCHEMA		1
#define CLASS		"/sys/class/misc"
#define MOST_BUCKETS	1000000
/* Maxima over time: slices of 100 ms, of twice that when there are so many, and so on. */
#define SLICES		512
#define FIRST_SLICE_NS	100000000ULL
#define NS_PER_S	1000000000ULL

/* What one kind of latency amounts to, in whole microseconds: sum and average are those of the histogram. */
struct latency {
	uint64_t count, sum_us, min_us, max_us, overflows;
	uint64_t *histogram;
	uint64_t slices[SLICES];
};

static struct {
	const char *device;	/* /dev/..., a PCI address, or nothing: the only one */
	const char *json;
	long cpu, trigger_cpu, priority, interval_us, samples, duration_s, histogram_us;
	bool self, show;
} asked = { .cpu = -1, .trigger_cpu = -1, .priority = 80, .interval_us = 1000, .histogram_us = 1000 };

static char node[PATH_MAX], pci_address[NAME_MAX + 1];
static int device;
static struct latency handler, thread;
static uint64_t lost, requested, began_ns, slice_ns = FIRST_SLICE_NS;
static unsigned int last_slice;
static bool late;		/* the run's time was over before its samples were all there */
static sem_t ready;
static volatile sig_atomic_t stopped;
/* Written by one thread before the other one is joined or after it was woken. */
static volatile bool finished;

static void __attribute__((noreturn, format(printf, 1, 2))) refuse(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("irqlat: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	/* The other thread may wait for an interrupt: nothing of it is worth waiting for. */
	_exit(2);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static long number(const char *option, const char *text, long least, long most)
{
	char *end;
	long value;

	errno = 0;
	value = strtol(text, &end, 10);
	if (errno || end == text || *end || value < least || value > most)
		refuse("--%s %s: not a number from %ld to %ld", option, text, least, most);
	return value;
}

/* One line of a small file; whether there is one. */
static bool line_of(const char *path, char *line, size_t size)
{
	FILE *file = fopen(path, "re");
	bool got = file && fgets(line, (int)size, file);

	if (file)
		fclose(file);
	if (got)
		line[strcspn(line, "\n")] = '\0';
	return got;
}

/* The device: its node, and the PCI address behind it ---------------------------------------------------------------- */

static const char *parent_of(const char *name, char *address, size_t size)
{
	char link[PATH_MAX], target[PATH_MAX];
	const char *last;
	ssize_t length;

	snprintf(link, sizeof(link), CLASS "/%s/device", name);
	length = readlink(link, target, sizeof(target) - 1);
	if (length < 0)
		return NULL;
	target[length] = '\0';
	last = strrchr(target, '/');
	snprintf(address, size, "%.*s", NAME_MAX, last ? last + 1 : target);
	return address;
}

static bool edu_without_driver(char *address, size_t size)
{
	DIR *directory = opendir("/sys/bus/pci/devices");
	struct dirent *entry;
	bool found = false;

	while (directory && !found && (entry = readdir(directory))) {
		char path[PATH_MAX], vendor[16], id[16];

		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/vendor", entry->d_name);
		if (!line_of(path, vendor, sizeof(vendor)) || strcmp(vendor, "0x1234"))
			continue;
		snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/device", entry->d_name);
		if (line_of(path, id, sizeof(id)) && !strcmp(id, "0x11e8")) {
			snprintf(address, size, "%s", entry->d_name);
			found = true;
		}
	}
	if (directory)
		closedir(directory);
	return found;
}

static void find_device(void)
{
	const char *wanted = asked.device;
	DIR *directory = opendir(CLASS);
	struct dirent *entry;
	char address[NAME_MAX + 1];
	int found = 0;

	if (wanted && !strncmp(wanted, "/dev/", 5))
		wanted += 5;
	while (directory && (entry = readdir(directory))) {
		if (!parent_of(entry->d_name, address, sizeof(address)))
			continue;
		if (wanted ? strcmp(wanted, entry->d_name) && strcmp(wanted, address)
			   : strncmp(entry->d_name, "irqlat", 6))
			continue;
		snprintf(node, sizeof(node), "/dev/%s", entry->d_name);
		snprintf(pci_address, sizeof(pci_address), "%s", address);
		found++;
	}
	if (directory)
		closedir(directory);
	if (found > 1)
		refuse("there are %d devices: name one with --device", found);
	if (found)
		return;
	if (wanted)
		refuse("no device %s is driven by a driver for irqlat: load its module", asked.device);
	if (edu_without_driver(address, sizeof(address)))
		refuse("the device %s has no driver: modprobe irqlat_edu", address);
	refuse("there is no device: no driver for irqlat is loaded, and no edu (1234:11e8) is on the PCI bus");
}

/* Where the interrupt goes --------------------------------------------------------------------------------------------- */

static void raise_interrupt(void)
{
	if (write(device, "", 1) != 1 && errno != EINTR)
		refuse("the interrupt of %s cannot be raised: %s", pci_address, strerror(errno));
}

static void bind_interrupt(void)
{
	char path[PATH_MAX], line[256];
	struct dirent *entry;
	DIR *directory;
	long irq = -1;
	FILE *file;

	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/msi_irqs", pci_address);
	directory = opendir(path);
	while (directory && (entry = readdir(directory)))
		if (entry->d_name[0] != '.') {
			if (irq >= 0)
				refuse("%s has several interrupts: irqlat measures a device with one", pci_address);
			irq = number("device", entry->d_name, 0, INT_MAX);
		}
	if (directory)
		closedir(directory);
	if (irq < 0)
		refuse("%s has no message-signalled interrupt (%s)", pci_address, path);
	snprintf(path, sizeof(path), "/proc/irq/%ld/smp_affinity_list", irq);
	file = fopen(path, "we");
	if (!file || fprintf(file, "%ld\n", asked.cpu) < 0 || fclose(file))
		refuse("interrupt %ld cannot be sent to CPU %ld: %s: %s", irq, asked.cpu, path, strerror(errno));
	/* A message that cannot be masked is sent elsewhere while it is handled: that takes an interrupt, or two. */
	for (int tries = 0; tries < 3; tries++) {
		struct irqlat_event event;

		raise_interrupt();
		if (read(device, &event, sizeof(event)) != (ssize_t)sizeof(event))
			refuse("the interrupt of %s does not come: %s", pci_address, strerror(errno));
	}
	snprintf(path, sizeof(path), "/proc/irq/%ld/effective_affinity_list", irq);
	if (!line_of(path, line, sizeof(line)))
		refuse("where interrupt %ld goes cannot be read: %s: %s", irq, path, strerror(errno));
	if (atol(line) != asked.cpu || strspn(line, "0123456789") != strlen(line))
		refuse("interrupt %ld was to go to CPU %ld, and goes to %s", irq, asked.cpu, line);
}

/* Counting --------------------------------------------------------------------------------------------------------------- */

static void prepare(struct latency *latency)
{
	latency->min_us = UINT64_MAX;
	latency->histogram = calloc((size_t)asked.histogram_us, sizeof(*latency->histogram));
	if (!latency->histogram)
		refuse("there is no memory for a histogram of %ld us", asked.histogram_us);
}

static void halve(struct latency *latency)
{
	for (unsigned int i = 0; i < SLICES; i++) {
		uint64_t first = 2 * i < SLICES ? latency->slices[2 * i] : 0;
		uint64_t second = 2 * i < SLICES ? latency->slices[2 * i + 1] : 0;

		latency->slices[i] = first > second ? first : second;
	}
}

/* A slice's 0 stands for no sample: the maximum is kept with one added. */
static void count(struct latency *latency, uint64_t ns, unsigned int slice)
{
	uint64_t us = ns / 1000;

	latency->count++;
	latency->sum_us += us;
	if (us < latency->min_us)
		latency->min_us = us;
	if (us > latency->max_us)
		latency->max_us = us;
	if (us < (uint64_t)asked.histogram_us)
		latency->histogram[us]++;
	else
		latency->overflows++;
	if (us + 1 > latency->slices[slice])
		latency->slices[slice] = us + 1;
}

static void count_event(const struct irqlat_event *event, uint64_t woken_ns)
{
	unsigned int slice;

	if (event->cpu != (uint32_t)asked.cpu) {
		fprintf(stderr, "irqlat: an interrupt came on CPU %u, not on %ld\n", event->cpu, asked.cpu);
		_exit(1);
	}
	if (event->handled_ns < event->raised_ns || woken_ns < event->handled_ns) {
		fprintf(stderr, "irqlat: an interrupt was handled before it was raised: the clocks of CPUs differ\n");
		_exit(1);
	}
	while ((slice = (unsigned int)((woken_ns - began_ns) / slice_ns)) >= SLICES) {
		halve(&handler);
		halve(&thread);
		slice_ns *= 2;
		last_slice /= 2;
	}
	if (slice > last_slice)
		last_slice = slice;
	count(&handler, event->handled_ns - event->raised_ns, slice);
	count(&thread, woken_ns - event->raised_ns, slice);
}

/* The two threads ------------------------------------------------------------------------------------------------------ */

static void pin(const char *what, long cpu)
{
	cpu_set_t *set = CPU_ALLOC((size_t)cpu + 1);
	size_t size = CPU_ALLOC_SIZE((size_t)cpu + 1);

	if (!set)
		refuse("there is no memory");
	CPU_ZERO_S(size, set);
	CPU_SET_S((size_t)cpu, size, set);
	if (sched_setaffinity(0, size, set))
		refuse("the %s thread cannot run on CPU %ld: %s", what, cpu, strerror(errno));
	CPU_FREE(set);
}

static void sleep_until(uint64_t ns)
{
	struct timespec until = { .tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S) };

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

/* When the next interrupt is due; one that is late puts off those behind it, and none is made up for. */
static uint64_t next_after(uint64_t due)
{
	uint64_t now = now_ns(), interval = (uint64_t)asked.interval_us * 1000;

	return due + interval > now ? due + interval : now + interval;
}

static void *trigger(void *nothing)
{
	uint64_t due = began_ns;

	pin("raising", asked.trigger_cpu);
	for (;;) {
		while (sem_wait(&ready))
			;
		if (finished)
			return nothing;
		due = next_after(due);
		sleep_until(due);
		raise_interrupt();
	}
}

static bool wanted(uint64_t done)
{
	if (stopped || done >= requested)
		return false;
	if (asked.duration_s && now_ns() - began_ns >= (uint64_t)asked.duration_s * NS_PER_S) {
		late = true;
		return false;
	}
	return true;
}

static void *measure(void *nothing)
{
	struct sched_param param = { .sched_priority = (int)asked.priority };
	uint64_t due = began_ns, woken;
	struct irqlat_event event;
	ssize_t got;

	pin("measuring", asked.cpu);
	if (sched_setscheduler(0, SCHED_FIFO, &param))
		refuse("SCHED_FIFO priority %ld is refused: %s; run it as root", asked.priority, strerror(errno));
	for (uint64_t done = 0; wanted(done); done++) {
		if (asked.self) {
			due = next_after(due);
			sleep_until(due);
			raise_interrupt();
		} else {
			sem_post(&ready);
		}
		got = read(device, &event, sizeof(event));
		woken = now_ns();
		if (got == (ssize_t)sizeof(event))
			count_event(&event, woken);
		else if (got < 0 && errno == ETIMEDOUT)
			lost++;
		else
			refuse("%s cannot be read: %s", node, got < 0 ? strerror(errno) : "it gives too little");
	}
	finished = true;
	sem_post(&ready);
	return nothing;
}

/* What is said at the end ------------------------------------------------------------------------------------------------ */

static void write_latency(FILE *out, const char *name, const struct latency *latency)
{
	const char *comma = "";

	fprintf(out, " \"%s\": {\"min\": %llu, \"max\": %llu, \"avg\": %.3f, \"overflows\": %llu, \"histogram\": {", name,
		(unsigned long long)(latency->count ? latency->min_us : 0), (unsigned long long)latency->max_us,
		latency->count ? (double)latency->sum_us / (double)latency->count : 0.0,
		(unsigned long long)latency->overflows);
	for (long us = 0; us < asked.histogram_us; us++)
		if (latency->histogram[us]) {
			fprintf(out, "%s\"%ld\": %llu", comma, us, (unsigned long long)latency->histogram[us]);
			comma = ", ";
		}
	fputs("}},\n", out);
}

static void write_json(FILE *out)
{
	const char *comma = "";
	struct timespec resolution;

	clock_getres(CLOCK_MONOTONIC, &resolution);
	fprintf(out, "{\"schema\": %d, \"tool\": \"irqlat\", \"device\": \"%s\",\n", SCHEMA, pci_address);
	/* every interrupt was seen on that CPU, or the run ended there */
	fprintf(out, " \"cpu\": %ld, \"irq_cpu\": %ld, \"priority\": %ld, \"policy\": \"fifo\",\n", asked.cpu, asked.cpu,
		asked.priority);
	/* of a run that lasts a time, as many as were raised in it */
	fprintf(out, " \"interval_us\": %ld, \"requested\": %llu, \"samples\": %llu, \"lost\": %llu,\n", asked.interval_us,
		(unsigned long long)(late ? thread.count + lost : requested), (unsigned long long)thread.count,
		(unsigned long long)lost);
	fprintf(out, " \"timer_ns\": %llu, \"histogram_us\": %ld,\n",
		(unsigned long long)resolution.tv_sec * NS_PER_S + (unsigned long long)resolution.tv_nsec,
		asked.histogram_us);
	write_latency(out, "handler", &handler);
	write_latency(out, "thread", &thread);
	fputs(" \"max_over_time\": [", out);
	for (unsigned int i = 0; i <= last_slice; i++)
		if (thread.slices[i]) {
			fprintf(out, "%s\n  {\"at_s\": %.1f, \"handler\": %llu, \"thread\": %llu}", comma,
				(double)(i + 1) * (double)slice_ns / (double)NS_PER_S,
				(unsigned long long)handler.slices[i] - 1, (unsigned long long)thread.slices[i] - 1);
			comma = ",";
		}
	fputs("\n ]}\n", out);
}

/* Whole or not at all: a run that is killed leaves none that looks complete. */
static void save_json(void)
{
	char part[PATH_MAX];
	FILE *out;

	if (!strcmp(asked.json, "-")) {
		write_json(stdout);
		if (fflush(stdout) || ferror(stdout))
			refuse("the result cannot be written: %s", strerror(errno));
		return;
	}
	if ((size_t)snprintf(part, sizeof(part), "%s.part", asked.json) >= sizeof(part))
		refuse("--json: the name is too long");
	out = fopen(part, "we");
	if (!out)
		refuse("%s cannot be written: %s", part, strerror(errno));
	write_json(out);
	if (ferror(out) || fflush(out) || fsync(fileno(out)) || fclose(out) || rename(part, asked.json))
		refuse("%s cannot be written: %s", asked.json, strerror(errno));
}

static void show(FILE *out, const char *name, const struct latency *latency)
{
	if (!latency->count) {
		fprintf(out, "%-8s no sample\n", name);
		return;
	}
	fprintf(out, "%-8s min %llu us  avg %.1f us  max %llu us  over %ld us: %llu\n", name,
		(unsigned long long)latency->min_us, (double)latency->sum_us / (double)latency->count,
		(unsigned long long)latency->max_us, asked.histogram_us, (unsigned long long)latency->overflows);
	for (long us = 0; asked.show && us < asked.histogram_us; us++)
		if (latency->histogram[us])
			fprintf(out, "%8ld us %llu\n", us, (unsigned long long)latency->histogram[us]);
}

/* Options ------------------------------------------------------------------------------------------------------------------ */

static const char usage[] =
	"usage: irqlat --cpu CPU [option ...]\n"
	"\n"
	"Measures a device's interrupt latency: from the register write that raises it to the\n"
	"driver's handler, and to a SCHED_FIFO thread that waits for it.\n"
	"\n"
	"  -c, --cpu CPU          the measured CPU: the interrupt and the thread go there\n"
	"  -t, --trigger-cpu CPU  where the thread that raises it runs (the first other CPU)\n"
	"  -S, --self             raise it from the measured thread, instead\n"
	"  -d, --device DEVICE    /dev/irqlat0, or a PCI address (the only one there is)\n"
	"  -p, --priority N       SCHED_FIFO priority, 1 to 99 (80)\n"
	"  -i, --interval US      microseconds between interrupts (1000)\n"
	"  -n, --samples N        end after N interrupts (1000)\n"
	"  -D, --duration S       end after S seconds, instead\n"
	"  -b, --histogram US     count latencies below US one by one (1000)\n"
	"  -H, --show-histogram   print the histograms, too\n"
	"  -j, --json FILE        write the result to FILE, - for standard output\n"
	"  -h, --help             show this\n"
	"\n"
	"Exit status: 0 measured, 1 lost interrupts or interrupted, 2 cannot be measured.\n";

static void read_options(int count_, char **words)
{
	static const struct option options[] = {
		{ "cpu", required_argument, NULL, 'c' },
		{ "trigger-cpu", required_argument, NULL, 't' },
		{ "self", no_argument, NULL, 'S' },
		{ "device", required_argument, NULL, 'd' },
		{ "priority", required_argument, NULL, 'p' },
		{ "interval", required_argument, NULL, 'i' },
		{ "samples", required_argument, NULL, 'n' },
		{ "duration", required_argument, NULL, 'D' },
		{ "histogram", required_argument, NULL, 'b' },
		{ "show-histogram", no_argument, NULL, 'H' },
		{ "json", required_argument, NULL, 'j' },
		{ "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 },
	};
	int option;

	while ((option = getopt_long(count_, words, "c:t:Sd:p:i:n:D:b:Hj:h", options, NULL)) != -1)
		switch (option) {
		case 'c': asked.cpu = number("cpu", optarg, 0, 65535); break;
		case 't': asked.trigger_cpu = number("trigger-cpu", optarg, 0, 65535); break;
		case 'S': asked.self = true; break;
		case 'd': asked.device = optarg; break;
		case 'p': asked.priority = number("priority", optarg, 1, 99); break;
		/* shorter than the driver's timeout_ms: a longer one would have interrupts lost before they are raised */
		case 'i': asked.interval_us = number("interval", optarg, 10, 1000000); break;
		case 'n': asked.samples = number("samples", optarg, 1, LONG_MAX); break;
		case 'D': asked.duration_s = number("duration", optarg, 1, 31536000); break;
		case 'b': asked.histogram_us = number("histogram", optarg, 1, MOST_BUCKETS); break;
		case 'H': asked.show = true; break;
		case 'j': asked.json = optarg; break;
		case 'h': fputs(usage, stdout); exit(0);
		default: exit(2);	/* getopt said why */
		}
	if (optind < count_)
		refuse("%s: what is that? irqlat --help shows the options", words[optind]);
	if (asked.cpu < 0)
		refuse("no CPU is named: --cpu CPU");
	if (asked.samples && asked.duration_s)
		refuse("--samples and --duration: name one of them");
	if (asked.self && asked.trigger_cpu >= 0)
		refuse("--self and --trigger-cpu: name one of them");
	if (asked.duration_s)
		requested = (uint64_t)asked.duration_s * 1000000 / (uint64_t)asked.interval_us;
	else
		requested = asked.samples ? (uint64_t)asked.samples : 1000;
	if (!requested)
		refuse("--duration %ld: not one interval of %ld us", asked.duration_s, asked.interval_us);
}

/* The first CPU that this process may run on and that is not the measured one. */
static long another_cpu(void)
{
	cpu_set_t *set = CPU_ALLOC(65536);
	size_t size = CPU_ALLOC_SIZE(65536);
	long found = -1;

	if (!set || sched_getaffinity(0, size, set))
		refuse("the CPUs of this process are not known: %s", strerror(errno));
	for (long cpu = 0; found < 0 && cpu < 65536; cpu++)
		if (cpu != asked.cpu && CPU_ISSET_S((size_t)cpu, size, set))
			found = cpu;
	CPU_FREE(set);
	if (found < 0)
		refuse("there is no other CPU to raise interrupts from: name one with --trigger-cpu, or use --self");
	return found;
}

static void stop(int signal)
{
	stopped = signal;
}

int main(int count_, char **words)
{
	struct sigaction action = { .sa_handler = stop, .sa_flags = SA_RESTART };
	pthread_t measuring, raising;
	int latency_device, zero = 0;

	read_options(count_, words);
	find_device();
	device = open(node, O_RDWR | O_CLOEXEC);
	if (device < 0)
		refuse("%s cannot be opened: %s%s", node, strerror(errno),
		       errno == EBUSY ? "; another irqlat measures with it" : "");
	bind_interrupt();
	if (asked.trigger_cpu < 0 && !asked.self)
		asked.trigger_cpu = another_cpu();
	prepare(&handler);
	prepare(&thread);
	if (mlockall(MCL_CURRENT | MCL_FUTURE))
		refuse("memory cannot be locked: %s", strerror(errno));
	/* No deep sleep of CPUs as long as it is open, as cyclictest does; not every kernel has it. */
	latency_device = open("/dev/cpu_dma_latency", O_RDWR | O_CLOEXEC);
	if (latency_device >= 0 && write(latency_device, &zero, sizeof(zero)) != (ssize_t)sizeof(zero))
		refuse("/dev/cpu_dma_latency cannot be written: %s", strerror(errno));
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);

	sem_init(&ready, 0, 0);
	began_ns = now_ns();
	if (pthread_create(&measuring, NULL, measure, NULL) ||
	    (!asked.self && pthread_create(&raising, NULL, trigger, NULL)))
		refuse("threads cannot be made");
	pthread_join(measuring, NULL);
	if (!asked.self)
		pthread_join(raising, NULL);

	if (asked.json)
		save_json();
	if (!asked.json || strcmp(asked.json, "-")) {
		show(stdout, "handler", &handler);
		show(stdout, "thread", &thread);
	}
	if (lost)
		fprintf(stderr, "irqlat: %llu of %llu interrupts were lost\n", (unsigned long long)lost,
			(unsigned long long)(thread.count + lost));
	if (stopped)
		fprintf(stderr, "irqlat: interrupted after %llu of %llu samples\n", (unsigned long long)thread.count,
			(unsigned long long)requested);
	else if (late && thread.count < requested)
		fprintf(stderr, "irqlat: note: %llu of %llu samples in %ld s: intervals were longer than asked for\n",
			(unsigned long long)thread.count, (unsigned long long)requested, asked.duration_s);
	if (!thread.count && !lost && !stopped)
		refuse("not one sample was taken");
	return lost || stopped ? 1 : 0;
}
