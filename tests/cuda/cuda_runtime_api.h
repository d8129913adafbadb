// The host's answer to the toolkit's header of this name.
#pragma once

#include "shim.h"
