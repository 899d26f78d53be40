/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * What a driver that irqlat measures offers: one character device, /dev/irqlat0.
 *
 * write(), any bytes: raise the device's interrupt, and return at once.
 * read(), one struct irqlat_event: wait for the interrupt that was raised last. ETIMEDOUT when it does not come in the
 * driver's own time, ENODEV when the device is taken away meanwhile.
 *
 * Its parent in sysfs (/sys/class/misc/irqlat0/device) is the device, whose interrupt is the only one in msi_irqs/.
 */
#ifndef IRQLAT_H
#define IRQLAT_H

#include <linux/types.h>

struct irqlat_event {
	__u64 raised_ns;	/* CLOCK_MONOTONIC just before the register is written */
	__u64 handled_ns;	/* CLOCK_MONOTONIC as the first thing in the interrupt handler */
	__u32 cpu;		/* where the handler ran */
	__u32 irq;		/* the interrupt's number, as in /proc/irq/ */
};

#endif
