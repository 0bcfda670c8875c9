-- When a task may run: its priority and its start, as the submission asks for them. Most tasks have no placement.

-- Returns the placement: numbers, and texts as in PLACEMENT_FIELDS.
local function placement(task)
  if task.place then return task.place end
  local place, at = {}, 0
  if task.placement then
    for value in string.gmatch(task.placement .. '\31', '([^\31]*)\31') do
      at = at + 1
      if PLACEMENT_FIELDS[at] then place[PLACEMENT_FIELDS[at]] = value end
    end
  end
  place.priority = tonumber(place.priority or '') or DEFAULT_PRIORITY
  place.start_us = tonumber(place.start_us or '') or 0
  task.place = place
  return place
end

local function write_placement(place)
  local values = {}
  for at, name in ipairs(PLACEMENT_FIELDS) do
    local value = place[name]
    values[at] = type(value) == 'number' and string.format('%.0f', value) or value or ''
  end
  return table.concat(values, '\31')
end

-- The task's position in its queue: the time of its queueing. A priority is worth PRIORITY_STEP of waiting.
local function score(task)
  if not task.placement then return task.queued_us end
  return task.queued_us - (placement(task).priority - DEFAULT_PRIORITY) * PRIORITY_STEP * 1000000
end

-- Whether the task waits for its start. A task that waits for its next attempt had one before.
local function is_delayed(task) return task.state == 'WAITING' and task.attempt == 0 and task.placement ~= false end
