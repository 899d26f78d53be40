// SPDX-License-Identifier: GPL-2.0-only
/*
 * Interrupt latency of qemu's device "edu" (1234:11e8, docs/specs/edu.rst of qemu), for the program irqlat.
 *
 * A driver for a device of your own needs three things in its place: a register whose write makes the device interrupt,
 * how the interrupt is acknowledged, and the ids. What userland sees is irqlat.h.
 */
#include <linux/completion.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/ktime.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/uaccess.h>

#include "irqlat.h"

#define EDU_ID		0x00	/* 0xRRrr00ed, RR.rr being the device's version */
#define EDU_STATUS	0x24	/* which interrupts were raised and not acknowledged: one bit each */
#define EDU_RAISE	0x60
#define EDU_ACKNOWLEDGE	0x64

/* Spinning longer would only tell that the machine hangs. */
#define MOST_SPIN_US	1000000

static int set_spin(const char *text, const struct kernel_param *parameter)
{
	return param_set_uint_minmax(text, parameter, 0, MOST_SPIN_US);
}

static const struct kernel_param_ops spin_operations = { .set = set_spin, .get = param_get_uint };
static unsigned int spin_us;
module_param_cb(spin_us, &spin_operations, &spin_us, 0644);
__MODULE_PARM_TYPE(spin_us, "uint");
MODULE_PARM_DESC(spin_us, "microseconds that each interrupt keeps its CPU, to provoke a disturbance (0: none)");

static unsigned int timeout_ms = 2000;
module_param(timeout_ms, uint, 0644);
MODULE_PARM_DESC(timeout_ms, "milliseconds after which an interrupt is lost");

struct irqlat {
	void __iomem *registers;
	struct miscdevice misc;
	struct mutex raising;		/* one write at a time */
	u32 bit;			/* the interrupt that was raised last: one that is late is not taken for it */
	struct irqlat_event event;
	struct completion handled;
	unsigned long open;		/* bit 0: a program has it */
	struct completion closed;
	bool gone;
};

static irqreturn_t irqlat_interrupt(int irq, void *data)
{
	u64 now = ktime_get_ns();	/* before anything else: this is what is measured */
	struct irqlat *irqlat = data;
	u32 status = readl(irqlat->registers + EDU_STATUS);
	u64 until = now + spin_us * 1000ULL;

	if (!status)
		return IRQ_NONE;
	writel(status, irqlat->registers + EDU_ACKNOWLEDGE);
	while (ktime_get_ns() < until)
		cpu_relax();
	if (status & READ_ONCE(irqlat->bit)) {
		irqlat->event.handled_ns = now;
		irqlat->event.cpu = smp_processor_id();
		irqlat->event.irq = irq;
		/* Built on a raw lock: a hard handler of PREEMPT_RT may call it, which it must not do with wake_up(). */
		complete(&irqlat->handled);
	}
	return IRQ_HANDLED;
}

static ssize_t irqlat_write(struct file *file, const char __user *buffer, size_t count, loff_t *offset)
{
	struct irqlat *irqlat = file->private_data;
	unsigned long flags;

	if (mutex_lock_interruptible(&irqlat->raising))
		return -ERESTARTSYS;
	if (irqlat->gone) {
		mutex_unlock(&irqlat->raising);
		return -ENODEV;
	}
	reinit_completion(&irqlat->handled);
	WRITE_ONCE(irqlat->bit, rol32(irqlat->bit, 1));
	/* Nothing may come between taking the time and the register, on this CPU either. */
	local_irq_save(flags);
	irqlat->event.raised_ns = ktime_get_ns();
	writel(irqlat->bit, irqlat->registers + EDU_RAISE);
	local_irq_restore(flags);
	mutex_unlock(&irqlat->raising);
	return count;
}

static ssize_t irqlat_read(struct file *file, char __user *buffer, size_t count, loff_t *offset)
{
	struct irqlat *irqlat = file->private_data;
	long left;

	if (count < sizeof(irqlat->event))
		return -EINVAL;
	left = wait_for_completion_interruptible_timeout(&irqlat->handled, msecs_to_jiffies(timeout_ms));
	if (left < 0)
		return left;
	if (irqlat->gone)
		return -ENODEV;
	if (!left)
		return -ETIMEDOUT;
	if (copy_to_user(buffer, &irqlat->event, sizeof(irqlat->event)))
		return -EFAULT;
	return sizeof(irqlat->event);
}

static int irqlat_open(struct inode *inode, struct file *file)
{
	struct irqlat *irqlat = container_of(file->private_data, struct irqlat, misc);

	if (test_and_set_bit(0, &irqlat->open))
		return -EBUSY;
	reinit_completion(&irqlat->closed);
	reinit_completion(&irqlat->handled);
	file->private_data = irqlat;
	return nonseekable_open(inode, file);
}

static int irqlat_release(struct inode *inode, struct file *file)
{
	struct irqlat *irqlat = file->private_data;

	clear_bit(0, &irqlat->open);
	complete(&irqlat->closed);
	return 0;
}

static const struct file_operations irqlat_operations = {
	.owner = THIS_MODULE,
	.open = irqlat_open,
	.release = irqlat_release,
	.read = irqlat_read,
	.write = irqlat_write,
};

static atomic_t devices = ATOMIC_INIT(0);

/* What pcim_ and devm_ functions took is given back when this fails, or after the device is gone. */
static int irqlat_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	struct irqlat *irqlat = devm_kzalloc(&pci->dev, sizeof(*irqlat), GFP_KERNEL);
	int error;

	if (!irqlat)
		return -ENOMEM;
	error = pcim_enable_device(pci);
	if (error)
		return error;
	irqlat->registers = pcim_iomap_region(pci, 0, KBUILD_MODNAME);
	if (IS_ERR(irqlat->registers))
		return PTR_ERR(irqlat->registers);
	if ((readl(irqlat->registers + EDU_ID) & 0xffff) != 0x00ed)
		return dev_err_probe(&pci->dev, -ENODEV, "it does not answer as edu does\n");
	mutex_init(&irqlat->raising);
	init_completion(&irqlat->handled);
	init_completion(&irqlat->closed);
	irqlat->bit = 1;

	pci_set_master(pci);	/* a message-signalled interrupt is a write by the device */
	error = pci_alloc_irq_vectors(pci, 1, 1, PCI_IRQ_MSI | PCI_IRQ_MSIX);
	if (error < 0)
		return dev_err_probe(&pci->dev, error, "it has no message-signalled interrupt\n");
	/* The handler itself is measured, not a thread that it would be put into by PREEMPT_RT. */
	error = devm_request_irq(&pci->dev, pci_irq_vector(pci, 0), irqlat_interrupt, IRQF_NO_THREAD,
				 KBUILD_MODNAME, irqlat);
	if (error)
		return error;

	irqlat->misc.minor = MISC_DYNAMIC_MINOR;
	irqlat->misc.name = devm_kasprintf(&pci->dev, GFP_KERNEL, "irqlat%d", atomic_fetch_inc(&devices));
	if (!irqlat->misc.name)
		return -ENOMEM;
	irqlat->misc.mode = 0600;
	irqlat->misc.fops = &irqlat_operations;
	irqlat->misc.parent = &pci->dev;
	pci_set_drvdata(pci, irqlat);
	return misc_register(&irqlat->misc);
}

/* The device may be taken from a program that has it open, to be given to a guest: the program is told, and waited for. */
static void irqlat_remove(struct pci_dev *pci)
{
	struct irqlat *irqlat = pci_get_drvdata(pci);

	mutex_lock(&irqlat->raising);
	irqlat->gone = true;
	mutex_unlock(&irqlat->raising);
	misc_deregister(&irqlat->misc);
	complete_all(&irqlat->handled);
	if (test_bit(0, &irqlat->open))
		wait_for_completion(&irqlat->closed);
}

static const struct pci_device_id irqlat_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{ }
};
MODULE_DEVICE_TABLE(pci, irqlat_ids);

static struct pci_driver irqlat_driver = {
	.name = KBUILD_MODNAME,
	.id_table = irqlat_ids,
	.probe = irqlat_probe,
	.remove = irqlat_remove,
};
module_pci_driver(irqlat_driver);

MODULE_DESCRIPTION("Interrupt latency of qemu's edu device");
MODULE_LICENSE("GPL");
