-- When and where a task may run, as the submission asks for it. Most tasks have no placement.

local function whole(number) return string.format('%.0f', number) end

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

local HELD = { OFFERED = true, RUNNING = true, CANCELLING_OFFER = true, CANCELLING = true }

local function words(text)
  local list = {}
  for word in string.gmatch(text or '', '[^,]+') do list[#list + 1] = word end
  return list
end

-- The part of its queue's key that names the task's lane. All tasks of a lane may run on the same agents, under the same
-- limits, so that one that may not run holds up only those that may not either. Most tasks are in the lane of their method.
local function lane(task)
  if not task.placement then return task.method end
  local place = placement(task)
  if not place.lane then
    local labels, limits, fairness = place.labels or '', place.limits or '', place.fairness_key or ''
    place.lane = labels == '' and limits == '' and fairness == '' and task.method
      or table.concat({ task.method, labels, limits, fairness, fairness ~= '' and whole(place.priority) or '' }, '\31')
  end
  return place.lane
end

-- The keys of the limits that the task's attempts count for.
local function limits_of(task)
  if not task.placement then return NOTHING end
  local place = placement(task)
  place.limit_keys = place.limit_keys or words(place.limits)
  return place.limit_keys
end
